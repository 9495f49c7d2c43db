# SPDX-License-Identifier: Apache-2.0
"""Samples of a running system: the routers' status, and rates between two of them.

Life cycle: ``run`` until cancelled; ``latest`` is None before the first answer. One asyncio loop.
A router that does not answer is remembered in ``error`` and asked again; nothing is raised.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from typing import Protocol

import msgspec

from components.errors import MigrateError
from components.messages import RouterReply

HISTORY = 600


class Source(Protocol):
    """What is needed of ``components.router.client.RouterClient``."""

    async def status(self) -> RouterReply:
        """Workers, streams, migrations, decisions."""
        ...


class Load(msgspec.Struct, frozen=True):
    """One worker at one moment."""

    worker: str
    role: str
    kv_use: float
    """Share of KV blocks in use."""
    running: int
    waiting: int
    tokens_per_s: float


class Point(msgspec.Struct, frozen=True):
    """The whole system at one moment. ``at`` is Unix time."""

    at: float
    tokens_per_s: float
    streams: int
    waiting: int
    moving: int
    workers: tuple[Load, ...]


class Sample(msgspec.Struct, frozen=True):
    """The newest point with everything behind it."""

    point: Point
    status: RouterReply


class Sampler:
    """See the module docstring."""

    def __init__(self, source: Source, interval_s: float = 1.0) -> None:
        self._source = source
        self._interval_s = interval_s
        self.history: deque[Point] = deque(maxlen=HISTORY)
        self.latest: Sample | None = None
        self.error = ""
        self.changed = asyncio.Condition()
        self._before: tuple[float, dict[str, int]] | None = None

    async def run(self) -> None:
        """Ask for ever."""
        while True:
            await self.once()
            await asyncio.sleep(self._interval_s)

    async def once(self) -> None:
        """Ask once."""
        try:
            status = await asyncio.wait_for(self._source.status(), 5.0)
        except (MigrateError, TimeoutError) as error:
            self.error = str(error) or "the router does not answer"
        except Exception as error:
            # Dynamo's client raises what its native side likes; people must read it, not lose the page.
            self.error = f"{type(error).__name__}: {error}"
        else:
            self.error = ""
            self.latest = Sample(self._point(status), status)
            self.history.append(self.latest.point)
        async with self.changed:
            self.changed.notify_all()

    def _point(self, status: RouterReply) -> Point:
        now = time.time()
        totals = {worker.worker: worker.tokens_total for worker in status.workers}
        rates = dict.fromkeys(totals, 0.0)
        if self._before is not None:
            then, before = self._before
            for name, total in totals.items():
                rates[name] = max(0, total - before.get(name, total)) / max(0.1, now - then)
        self._before = (now, totals)
        loads = []
        for worker in sorted(status.workers, key=lambda w: (w.role, w.worker)):
            stats = worker.stats
            used = 1 - stats.free_blocks / max(1, stats.total_blocks) if stats else 0.0
            counts = (stats.running, stats.waiting) if stats else (0, 0)
            loads.append(Load(worker.worker, worker.role, used, *counts, rates[worker.worker]))
        return Point(
            at=now,
            tokens_per_s=sum(rates.values()),
            streams=len(status.streams),
            waiting=sum(load.waiting for load in loads),
            moving=sum(stream.moving for stream in status.streams),
            workers=tuple(loads),
        )

    async def next(self, timeout_s: float = 10.0) -> None:
        """Wait for the next sample, or for the time-out."""
        async with self.changed:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.changed.wait(), timeout_s)
