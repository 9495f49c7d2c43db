# SPDX-License-Identifier: Apache-2.0
"""One router and some workers on a virtual network, and what a client sees of them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any
from unittest import mock

from components.engine.paged import PagedEngine, PagedOptions
from components.engine.paged.model import PagedKV, generator_of, salt_of
from components.engine.protocol import Sampling
from components.router.openai import to_request
from components.router.service import RouterService
from components.serve.config import RouterConfig
from components.worker.service import WorkerService
from tests.faults import clock
from tests.faults.agent import VirtualAgent, Wire
from tests.faults.network import Context, Host, Network, Weather

LEASE_S = 10.0
RESTART_S = 2.0
SIZES: dict[str, Any] = {"block_size": 4, "max_model_len": 160, "vocab_size": 5000, "step_s": 0.01, "max_num_seqs": 8}


@dataclass
class Answer:
    """What one client got."""

    tokens: list[int] = field(default_factory=list)
    finish: str = ""
    error: str = ""
    ended: bool = False


def payload(prompt: list[int], count: int, seed: int | None) -> dict[str, Any]:
    """A request as Dynamo's frontend sends it."""
    return {
        "token_ids": prompt,
        "sampling_options": {"temperature": 0.7 if seed is not None else 0.0, "seed": seed},
        "stop_conditions": {"max_tokens": count, "ignore_eos": True},
    }


def expected(body: dict[str, Any]) -> list[int]:
    """Tokens of a request that nobody disturbs, by the definition of the paged model."""
    request = to_request("", body, {}, SIZES["max_model_len"])
    sampling: Sampling = request.sampling
    size = SIZES["block_size"]
    kv = PagedKV(SIZES["max_model_len"] // size, size, 2, 4, SIZES["vocab_size"])
    blocks = list(range(SIZES["max_model_len"] // size))
    tokens = list(request.prompt_token_ids)
    for position, token in enumerate(tokens):
        kv.write(token, position, blocks)
    for drawn in range(sampling.max_tokens or 0):
        tokens.append(kv.next_token(len(tokens), blocks, salt_of(sampling, 0), generator_of(sampling, drawn)))
        kv.write(tokens[-1], len(tokens) - 1, blocks)
    return tokens[len(request.prompt_token_ids) :]


class Cluster:
    """See the module docstring. ``start`` and ``stop`` once."""

    def __init__(self, chance: Random, weather: Weather, prefill: int = 1, decode: int = 2, **options: Any) -> None:
        self.chance = chance
        self.network = Network(chance, weather)
        self.wire = Wire()
        self.wire.chance = chance
        self._options: dict[str, Any] = (
            SIZES | {"num_blocks": 120, "lease_s": LEASE_S, "copy_deadline_s": 5.0} | options
        )
        self._counts = {"prefill": prefill, "backend": decode}
        self._instances = iter(range(1, 1000))
        config = RouterConfig(model="paged", step_deadline_s=3.0, silence_s=12.0, replay_limit=30)
        self.router = RouterService(config, self.network, None)
        self._polling: asyncio.Task[None] | None = None
        self.engines: dict[int, PagedEngine] = {}
        self.retired: list[PagedEngine] = []
        self._jobs: set[asyncio.Task[Any]] = set()
        self.answers: dict[str, Answer] = {}
        self.contexts: dict[str, Any] = {}
        self.clients: list[asyncio.Task[Any]] = []

    async def start(self) -> None:
        """All workers, then the router."""
        for component, count in self._counts.items():
            for number in range(count):
                await self.new_worker(component, f"{component}-{number}")
        self.connect()
        while len(self.router.pool.workers) < sum(self._counts.values()):
            await asyncio.sleep(0.1)
        await asyncio.sleep(0.1)

    def connect(self) -> None:
        """The router looks for workers."""
        self._polling = asyncio.ensure_future(self.router.run())

    async def new_worker(self, component: str, name: str) -> Host:
        """One more worker, registered at once."""
        options = PagedOptions({"name": name}, **self._options)
        engine = PagedEngine(options, lambda config: VirtualAgent(self.wire, config))  # type: ignore[arg-type,return-value]
        info = await engine.start()
        host = Host(next(self._instances), component, WorkerService(engine, info))
        self.network.hosts[host.instance] = host
        self.engines[host.instance] = engine
        self.wire.held[name] = lambda block: engine._parts is None or engine._live.scheduler.pool.holders(block) > 0
        return host

    def hosts(self, component: str) -> list[Host]:
        """Those of a component that live."""
        return [h for h in self.network.hosts.values() if h.component == component and not h.dead]

    def kill(self, host: Host, restart: bool = True) -> None:
        """As kill -9: connections break, memory is gone; the supervisor starts it again."""
        if host.dead:
            return
        host.dead, host.died_at = True, asyncio.get_running_loop().time()
        host.proceed()
        host.broken.set()
        for task in list(host.tasks):
            task.cancel()
        engine = self.engines.pop(host.instance)
        name = engine._live.agent.ref.name
        del self.wire.agents[name]
        self.job(self._bury(host, engine, name, restart))

    async def _bury(self, host: Host, engine: PagedEngine, name: str, restart: bool) -> None:
        await engine.stop()
        if restart:
            await asyncio.sleep(RESTART_S)
            await self.new_worker(host.component, name)

    def stall(self, host: Host, seconds: float) -> None:
        """As SIGSTOP, and SIGCONT later. One that left discovery meanwhile ends itself, as Dynamo's runtime does."""
        if host.dead or not host.going.is_set():
            return
        scheduler = self.engines[host.instance]._live.scheduler
        begin = scheduler.begin
        scheduler.begin = lambda: host.going.is_set() and begin()  # type: ignore[method-assign]
        host.stall()

        async def later() -> None:
            await asyncio.sleep(seconds)
            if not host.dead:
                scheduler.begin = begin  # type: ignore[method-assign]
                if not host.listed():
                    self.kill(host)
                    return
                host.proceed()
                self.engines[host.instance]._wake()

        self.job(later())

    def job(self, work: Any) -> asyncio.Task[Any]:
        """Something that goes on beside."""
        task = asyncio.ensure_future(work)
        self._jobs.add(task)
        task.add_done_callback(self._jobs.discard)
        return task

    async def ask(self, name: str, body: dict[str, Any]) -> Answer:
        """One client's request, to its end."""
        answer = self.answers[name] = Answer()
        context = self.contexts[name] = _Client(name)
        try:
            async for chunk in self.router.generate(body, context):
                answer.tokens += chunk["token_ids"]
                answer.finish = chunk.get("finish_reason", answer.finish)
        except Exception as error:
            answer.error = f"{type(error).__name__}: {error}"
        finally:
            answer.ended = True
        return answer

    def kill_router(self) -> None:
        """Its connections to workers and clients break; what it owned is left to the workers' leases."""
        self.network.router_died = True
        self.job(self._bury_router())

    async def _bury_router(self) -> None:
        if self._polling is not None:
            self._polling.cancel()
        for task in [*self.router._tasks, *self.clients]:
            task.cancel()
        legs = [leg for s in self.router.streams.values() for leg in (s.owner, s._old) if leg is not None]
        for leg in legs:
            leg.task.cancel()

    async def rest(self) -> None:
        """Until nothing is going on, or the longest time-out of all is over."""
        for host in list(self.network.hosts.values()):
            if not host.dead:
                host.proceed()
        await asyncio.sleep(3 * LEASE_S + 60.0)

    async def accounts(self) -> None:
        """Raise unless every block of every living worker is free and accounted for."""
        for instance, engine in self.engines.items():
            await engine.check_integrity()
            stats = await engine.stats()
            left = [f"{r.request_id} {r.phase}" for r in await engine.requests()]
            assert not left and stats.free_blocks == stats.total_blocks, f"worker {instance} keeps {left} {stats}"

    async def stop(self) -> None:
        """End everything."""
        if self._polling is not None:
            self._polling.cancel()
        for task in list(self._jobs):
            task.cancel()
        for engine in list(self.engines.values()):
            await engine.stop()


class _Client(Context):
    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def id(self) -> str:
        """The request id."""
        return self._name


def in_virtual_time(play: Coroutine[Any, Any, object], problems: list[str]) -> None:
    """Play it to its end; whatever goes wrong is one of the problems."""
    with quiet():
        try:
            clock.run(play, problems.append)
        except Exception as error:
            problems.append(f"{type(error).__name__}: {error}")


@contextmanager
def quiet() -> Iterator[None]:
    """Without the log lines of a thousand faults."""
    import logging

    with mock.patch.object(logging.getLogger("components"), "disabled", True):
        level = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(level)
