# SPDX-License-Identifier: Apache-2.0
"""Hosts of the virtual network, and Dynamo's endpoints over it.

A message may be lost, come twice, overtake others or be late. A host may die (its connections break) or stand still
(nothing leaves or reaches it until it goes on). Dynamo's ``client`` and ``direct`` are what the router uses of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from enum import StrEnum
from random import Random
from typing import Any

from components.messages import WorkerCall, WorkerOp, unpack
from components.worker.service import WorkerService

LEASE_S = 5.0
"""After which a host that is silent leaves discovery."""


@dataclass
class Weather:
    """Chances of what may happen to a message."""

    latency_s: float = 0.001
    lost: float = 0.0
    twice: float = 0.0
    overtaken: float = 0.0
    late: float = 0.0
    late_s: float = 15.0
    calls_only: bool = False
    """Streams are spared: an ordered connection does not lose a message in its middle."""


class Fate(StrEnum):
    """What happens to one control call."""

    NORMAL = "normal"
    LOST = "lost"
    TWICE = "twice"
    LATE = "late"
    """After the caller's deadline."""
    VERY_LATE = "very late"
    """After every lease."""
    ANSWER_LOST = "answer lost"
    ANSWER_LATE = "answer late"


_LATE_S = {Fate.LATE: 4.0, Fate.VERY_LATE: 15.0}


class Context:
    """A request's context, as the endpoint that serves it sees it."""

    def __init__(self) -> None:
        self._gone = asyncio.Event()

    def stop(self) -> None:
        """The caller goes."""
        self._gone.set()

    async def async_killed_or_stopped(self) -> bool:
        """Wait until the caller has gone."""
        return await self._gone.wait()


class Host:
    """One worker process."""

    def __init__(self, instance: int, component: str, service: WorkerService) -> None:
        self.instance = instance
        self.component = component
        self.service = service
        self.dead = False
        self.going = asyncio.Event()
        self.going.set()
        self.silent_since: float | None = None
        self.died_at = 0.0
        self.tasks: set[asyncio.Task[None]] = set()
        self.broken = asyncio.Event()

    def stall(self) -> None:
        """Stand still, as with SIGSTOP."""
        if self.going.is_set():
            self.silent_since = asyncio.get_running_loop().time()
            self.going.clear()

    def proceed(self) -> None:
        """Go on, as with SIGCONT."""
        self.silent_since = None
        self.going.set()

    def listed(self) -> bool:
        """Is it in discovery?"""
        now = asyncio.get_running_loop().time()
        if self.dead:
            return now - self.died_at < LEASE_S
        return self.silent_since is None or now - self.silent_since < LEASE_S


class Network:
    """Carries messages.

    ``on_call`` is told of every control call before and after it was handled, ``on_stream`` of every stream when it
    reaches its host; ``fate`` decides about each control call but those for a worker's state.
    """

    def __init__(self, chance: Random, weather: Weather) -> None:
        self.chance = chance
        self.weather = weather
        self.hosts: dict[int, Host] = {}
        self.router_died = False
        self.on_call: Callable[[Host, WorkerCall, str], None] = lambda host, call, when: None
        self.on_stream: Callable[[Host], None] = lambda host: None
        self.fate: Callable[[Host, WorkerCall], Fate] = lambda host, call: Fate.NORMAL

    def endpoint(self, path: str) -> _Endpoint:
        """As Dynamo's runtime."""
        _, component, name = path.split(".")
        return _Endpoint(self, component, name)

    def delay(self) -> float:
        """Of one message."""
        usual = self.weather.latency_s * (0.5 + self.chance.random())
        return usual + (self.weather.late_s if self.chance.random() < self.weather.late else 0.0)

    def copies(self, stream: bool) -> int:
        """How often a message arrives."""
        if stream and self.weather.calls_only:
            return 1
        if self.chance.random() < self.weather.lost:
            return 0
        return 2 if self.chance.random() < self.weather.twice else 1


class _Endpoint:
    def __init__(self, network: Network, component: str, name: str) -> None:
        self._network = network
        self._component = component
        self._stream = name == "generate"

    async def client(self) -> _Endpoint:
        """Itself."""
        return self

    def instance_ids(self) -> list[int]:
        """Whom discovery lists."""
        return [h.instance for h in self._network.hosts.values() if h.component == self._component and h.listed()]

    async def direct(self, payload: Any, instance: int, **_: Any) -> AsyncIterator[Any]:
        """Call one instance."""
        host = self._network.hosts.get(instance)
        await asyncio.sleep(self._network.weather.latency_s)
        if host is None or host.dead or self._network.router_died:
            raise ConnectionError("connection refused")
        return self._answers(host, payload)

    async def _answers(self, host: Host, payload: Any) -> AsyncIterator[Any]:
        inbox: asyncio.Queue[Any] = asyncio.Queue()
        context = Context()
        broken = asyncio.ensure_future(host.broken.wait())
        item: asyncio.Future[Any] | None = None
        fate = self._fate(host, payload)
        copies = {Fate.LOST: 0, Fate.TWICE: 2}.get(fate)
        for _ in range(self._network.copies(self._stream) if copies is None else copies):
            self._start(host, payload, context, inbox, fate)
        try:
            while True:
                item = asyncio.ensure_future(inbox.get())
                await asyncio.wait([item, broken], return_when=asyncio.FIRST_COMPLETED)
                if not item.done():
                    item.cancel()
                    raise ConnectionError("connection reset by peer")
                value = item.result()
                if value is None:
                    return
                yield value
        finally:
            for waiting in filter(None, (broken, item)):
                waiting.cancel()
            asyncio.get_running_loop().call_later(self._network.delay(), context.stop)

    def _fate(self, host: Host, payload: Any) -> Fate:
        if self._stream:
            return Fate.NORMAL
        call = unpack(payload, WorkerCall)
        return Fate.NORMAL if call.op is WorkerOp.INFO else self._network.fate(host, call)

    def _start(self, host: Host, payload: Any, context: Context, inbox: asyncio.Queue[Any], fate: Fate) -> None:
        task = asyncio.ensure_future(self._work(host, payload, context, inbox, fate))
        host.tasks.add(task)
        task.add_done_callback(host.tasks.discard)

    async def _work(self, host: Host, payload: Any, context: Context, inbox: asyncio.Queue[Any], fate: Fate) -> None:
        network = self._network
        await asyncio.sleep(network.delay() + _LATE_S.get(fate, 0.0))
        await host.going.wait()
        call = None if self._stream else unpack(payload, WorkerCall)
        if call is not None:
            network.on_call(host, call, "before")
        else:
            network.on_stream(host)
        await host.going.wait()
        answers = host.service.generate(payload, context) if self._stream else host.service.control(payload)
        due = 0.0
        loop = asyncio.get_running_loop()
        async for item in answers:
            if call is not None:
                network.on_call(host, call, "after")
            await host.going.wait()
            if fate is Fate.ANSWER_LOST:
                return
            for _ in range(network.copies(self._stream)):
                due = self._due(due) + (_LATE_S[Fate.LATE] if fate is Fate.ANSWER_LATE else 0.0)
                loop.call_at(due, self._deliver, host, inbox, item)
        loop.call_at(self._due(due), self._deliver, host, inbox, None)

    def _due(self, before: float) -> float:
        network = self._network
        due = asyncio.get_running_loop().time() + network.delay()
        spared = self._stream and network.weather.calls_only
        if not spared and network.chance.random() < network.weather.overtaken:
            return due
        return max(due, before + 1e-6)

    def _deliver(self, host: Host, inbox: asyncio.Queue[Any], item: Any) -> None:
        if not host.dead:
            inbox.put_nowait(item)
