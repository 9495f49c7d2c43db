# SPDX-License-Identifier: Apache-2.0
"""The workers that a router knows: calls to one, load of all, choice of the best.

The pool asks every worker for its state twice a second; a worker that is gone from Dynamo's discovery is
forgotten at once. Errors: ``WorkerLost`` when a worker cannot be reached, otherwise what the worker raised.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from components.engine.protocol import GenerateOutput, RequestId
from components.errors import DeadlineExceeded, MigrateError, NoRoom, WorkerLost, from_code
from components.messages import Generate, WorkerCall, WorkerInfo, WorkerOp, WorkerReply, pack, unpack
from components.router.outputs import OutputChannel

logger = logging.getLogger(__name__)
POLL_S = 0.5
_ROUND_S = 2.0
_REPORT_S, _FIRST_REPORT_S = 30.0, 3.0
_CONNECT_AGAIN_S = 30.0
_LOOK_AFTER_S, _LOOK_S = 1.0, 5.0


class Worker:
    """One worker instance."""

    def __init__(self, instance: int, role: str, generate: Any, control: Any) -> None:
        self.instance = instance
        self.role = role
        # Instance ids of one etcd differ only in their last digits.
        self.name = f"{instance:016x}"[-8:]
        self.streams = 0
        """Requests that this router has on it."""
        self.prompt_tokens = 0
        """Of those, tokens of prompts that it has to compute before their first output."""
        self.prompts = 0
        """How many such prompts."""
        self.others = 0
        """Requests of other routers, as of its last report."""
        self.draining = False
        self.held_back = False
        """Set by ``dynamo drain``: no new requests, whatever the worker itself says."""
        self.state = WorkerReply()
        self.reported = time.monotonic()
        self.lost = False
        """Its last call found nobody: a dead worker stays listed for its lease."""
        self.moving = 0
        self.asked_at: float | None = None
        """Since when a call for its state is under way."""
        self.busy = 0.0
        """When its engine was last seen at work while that call had no answer."""
        self.looking = False
        self.tokens = 0
        self.channel: OutputChannel | None = None
        """Where outputs come; without it each request has a stream of Dynamo's."""
        self._connect_at = 0.0
        self._generate = generate
        self._control = control

    async def generate(self, message: Generate, context: Any) -> AsyncIterator[GenerateOutput]:
        """Outputs of a request on this worker. Raises ``WorkerLost`` when the stream breaks."""
        try:
            stream = await self._generate.direct(pack(message), self.instance, annotated=False, context=context)
            async for item in stream:
                yield unpack(item, GenerateOutput)
        except MigrateError:
            raise
        except Exception as error:
            self.lost = True
            raise WorkerLost(f"worker {self.name}: {error}") from error

    async def call(self, op: WorkerOp, request_id: str = "", timeout_s: float = 20.0, **more: Any) -> WorkerReply:
        """One control call."""
        message = WorkerCall(op, RequestId(request_id), **more)
        try:
            return await asyncio.wait_for(self._ask(message), timeout_s)
        except TimeoutError as error:
            raise DeadlineExceeded(f"worker {self.name} did not answer {op} within {timeout_s:g} s") from error

    async def _ask(self, message: WorkerCall) -> WorkerReply:
        try:
            stream = await self._control.direct(pack(message), self.instance, annotated=False)
            async for item in stream:
                reply = unpack(item, WorkerReply)
                if reply.error is not None:
                    raise from_code(*reply.error)
                return reply
        except MigrateError:
            raise
        except Exception as error:
            self.lost = True
            raise WorkerLost(f"worker {self.name}: {error}") from error
        raise WorkerLost(f"worker {self.name} closed the call without an answer")

    async def connect(self) -> None:
        """See to the channel, when the worker has said where; one that cannot be reached is tried again later."""
        lost = self.channel is None or not self.channel.open
        if not lost or not self.state.outputs or time.monotonic() < self._connect_at:
            return
        self._connect_at = time.monotonic() + _CONNECT_AGAIN_S
        try:
            self.channel = await OutputChannel.connect(self.name, self.state.outputs)
        except WorkerLost as error:
            logger.warning("%s; its requests have a stream each", error)

    def unanswered_s(self) -> float:
        """How long it has owed the answer to a call for its state."""
        return time.monotonic() - self.asked_at if self.asked_at is not None else 0.0

    @property
    def available(self) -> bool:
        """May it be given new requests?"""
        return not (self.draining or self.held_back) and self.state.info is not None

    @property
    def lease_s(self) -> float:
        """How long it keeps a frozen request without hearing of it."""
        return self.state.info.lease_s if self.state.info is not None else float("inf")

    def load(self) -> float:
        """Shares of KV blocks and seats in use, plus the steps that its prompts still take.

        A prompt takes a second seat while it is computed, since the next one would wait for it: of two workers that are
        one request apart, a new one goes where no prompt is. Reports are up to a step and half a second old: what
        this router itself has there is known better.
        """
        stats, info = self.state.stats, self.state.info
        if stats is None or info is None:
            return float("inf")
        used = 1.0 - stats.free_blocks / max(1, stats.total_blocks)
        taken = self.streams + self.others + self.prompts
        seats = taken / max(1, info.max_num_seqs)
        return used + seats + self.prompt_tokens / max(1, info.max_num_batched_tokens)

    def report(self, state: WorkerReply, asked_with: int) -> None:
        """Take its state in. ``asked_with`` are the streams that it had when it was asked: some have ended since."""
        self.state = state
        self.reported = time.monotonic()
        self.lost = False
        if (stats := state.stats) is not None:
            there = stats.running + stats.waiting + stats.frozen + stats.landing
            self.others = max(0, there - max(self.streams, asked_with))

    def describe(self) -> WorkerInfo:
        """Row for ``dynamo status``."""
        info = self.state.info
        return WorkerInfo(
            worker=self.name,
            role=self.role,
            draining=self.draining or self.held_back,
            agents=tuple(a.name for a in info.agents) if info else (),
            epochs=tuple(a.epoch[:8] for a in info.agents) if info else (),
            lanes=info.lanes if info else (),
            stats=self.state.stats,
            requests=self.state.requests,
            block_size=info.block_size if info else 0,
            max_num_seqs=info.max_num_seqs if info else 0,
            kv_bytes_per_token=info.kv_bytes_per_token if info else 0,
            report_age_s=time.monotonic() - self.reported,
            tokens_total=self.tokens,
            metrics=self.state.metrics,
        )


class WorkerPool:
    """All prefill and decode workers of a namespace."""

    def __init__(
        self,
        runtime: Any,
        namespace: str,
        on_drain: Callable[[Worker], None],
        round_robin: bool = False,
        channels: bool = True,
    ) -> None:
        self._runtime = runtime
        self._channels = channels
        self._namespace = namespace
        self._on_drain = on_drain
        self._turn = itertools.count() if round_robin else None
        self._clients: dict[str, tuple[Any, Any]] = {}
        self.workers: dict[int, Worker] = {}
        self._looks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Keep the table current until cancelled."""
        for component in ("prefill", "backend"):
            generate = await self._runtime.endpoint(f"{self._namespace}.{component}.generate").client()
            control = await self._runtime.endpoint(f"{self._namespace}.{component}.control").client()
            self._clients[component] = (generate, control)
        while True:
            await self.refresh()
            await asyncio.sleep(POLL_S)

    async def refresh(self) -> None:
        """One round of discovery and of asking everybody."""
        seen = set()
        for component, (generate, control) in self._clients.items():
            ready = set(generate.instance_ids()) & set(control.instance_ids())
            for instance in ready:
                seen.add(instance)
                if instance not in self.workers:
                    role = "prefill" if component == "prefill" else "decode"
                    self.workers[instance] = Worker(instance, role, generate, control)
        for gone in set(self.workers) - seen:
            channel = self.workers.pop(gone).channel
            if channel is not None:
                channel.retire()
        asking = [asyncio.ensure_future(self._refresh(w)) for w in self.workers.values() if w.asked_at is None]
        if asking:
            # One that stands still must not keep the others' state from us.
            await asyncio.wait(asking, timeout=_ROUND_S)
        for worker in self.workers.values():
            if worker.unanswered_s() > _LOOK_AFTER_S and not worker.looking:
                look = asyncio.ensure_future(self._look(worker))
                self._looks.add(look)
                look.add_done_callback(self._looks.discard)

    async def _look(self, worker: Worker) -> None:
        """Its engine does not answer: is it in a long step, or does it stand still?"""
        worker.looking = True
        try:
            if (await worker.call(WorkerOp.BUSY, timeout_s=_LOOK_S)).busy:
                worker.busy = time.monotonic()
        except MigrateError as error:
            logger.debug("worker %s did not say whether it is busy: %s", worker.name, error)
        finally:
            worker.looking = False

    async def _refresh(self, worker: Worker) -> None:
        worker.asked_at = time.monotonic()
        try:
            # Nobody can use a worker before its first report: that one is asked for again soon.
            timeout_s = _REPORT_S if worker.state.info is not None else _FIRST_REPORT_S
            streams = worker.streams
            worker.report(await worker.call(WorkerOp.INFO, timeout_s=timeout_s), streams)
            if self._channels:
                await worker.connect()
        except MigrateError as error:
            logger.debug("worker %s did not report: %s", worker.name, error)
            return
        finally:
            worker.asked_at = None
        if worker.state.draining and not worker.draining:
            worker.draining = True
            self._on_drain(worker)

    def pick(self, role: str, exclude: tuple[int, ...] = (), reachable: bool = False) -> Worker:
        """The least loaded worker of a role, or the next one in turn; a lost one only when there is no other.

        Raises ``NoRoom`` when there is none, or none that is ``reachable`` where that is asked for.
        """
        fit = [w for w in self.workers.values() if w.role == role and w.available and w.instance not in exclude]
        if not fit:
            raise NoRoom(f"no {role} worker is available")
        found = [w for w in fit if not w.lost]
        if reachable and not found:
            raise NoRoom(f"no {role} worker can be reached of {', '.join(w.name for w in fit)}")
        fit = found or fit
        if self._turn is not None and role == "decode":
            return sorted(fit, key=lambda w: w.instance)[next(self._turn) % len(fit)]
        return min(fit, key=Worker.load)

    def find(self, name: str) -> Worker:
        """A worker by its short name, or by the start or end of one."""
        word = name.lower()
        found = [w for w in self.workers.values() if w.name.startswith(word) or w.name.endswith(word)]
        if len(found) != 1:
            known = ", ".join(w.name for w in self.workers.values()) or "none"
            raise NoRoom(f"{len(found)} workers match {name!r}; known: {known}")
        return found[0]
