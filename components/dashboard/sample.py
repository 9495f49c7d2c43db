# SPDX-License-Identifier: Apache-2.0
"""Samples of a running system: the workers' state, and rates between two samples.

Life cycle: ``run`` until cancelled; ``latest`` is None before the first answer. One asyncio loop.
``error`` names workers that do not answer, which are asked again; nothing is raised.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import time
from collections import deque

import msgspec

from components.client import Workers
from components.dashboard.lives import Life, Lives
from components.engine.protocol import RequestPhase
from components.migration.messages import Decision, MoveRecord, RequestRow
from components.status import Status, WorkerReport

HISTORY = 600
_PATIENCE_S = 2.0
_OLDEST, _MOVES = 20, 50


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
    """The whole system at one moment. ``at`` is Unix time here."""

    at: float
    tokens_per_s: float
    requests: int
    waiting: int
    moving: int
    workers: tuple[Load, ...]


class Sample(msgspec.Struct, frozen=True):
    """The newest point with details. Only some requests: there may be a hundred thousand."""

    point: Point
    workers: tuple[WorkerReport, ...]
    """Without their requests."""
    requests: tuple[tuple[str, RequestRow], ...]
    """The oldest, with their workers."""
    moves: tuple[MoveRecord, ...]
    """The last, the newest first."""
    decisions: tuple[Decision, ...]
    lives: tuple[Life, ...]


class Sampler:
    """See the module docstring."""

    def __init__(self, source: Workers, interval_s: float = 1.0) -> None:
        self._source = source
        self._interval_s = interval_s
        self.history: deque[Point] = deque(maxlen=HISTORY)
        self.latest: Sample | None = None
        self.error = ""
        self.changed = asyncio.Condition()
        self._lives = Lives()
        self._before: dict[str, tuple[float, int]] = {}

    async def run(self) -> None:
        """Sample until cancelled."""
        while True:
            await self.once()
            await asyncio.sleep(self._interval_s)

    async def once(self) -> None:
        """Take one sample."""
        try:
            await self._source.refresh(_PATIENCE_S, decisions=True)
            status = self._source.status()
        except Exception as error:
            # Dynamo's client raises exceptions of any class; people must read them and keep the page.
            self.error = f"{type(error).__name__}: {error}"
        else:
            missing = [
                f"worker {worker.worker} is missing: {worker.missing}" for worker in status.workers if worker.missing
            ]
            self.error = "; ".join(missing) if status.workers else "no worker is in Dynamo's discovery"
            self.latest = self._sample(status)
            self.history.append(self.latest.point)
        async with self.changed:
            self.changed.notify_all()

    def _sample(self, status: Status) -> Sample:
        now = time.time()
        oldest = heapq.nlargest(_OLDEST, status.requests(), key=lambda pair: pair[1].age_s)
        return Sample(
            self._point(status, now),
            tuple(msgspec.structs.replace(worker, requests=()) for worker in status.workers),
            tuple((worker.worker, row) for worker, row in oldest),
            tuple(reversed(status.moves[-_MOVES:])),
            status.decisions,
            self._lives.take(status, now),
        )

    def _point(self, status: Status, now: float) -> Point:
        loads = []
        for worker in sorted(status.workers, key=lambda w: (w.role, w.worker)):
            if (stats := worker.stats) is None:
                continue  # Missing is not empty.
            used = 1 - stats.free_blocks / max(1, stats.total_blocks)
            rate = self._rate(worker)
            loads.append(Load(worker.worker, worker.role, used, stats.running, stats.waiting, rate))
        rows = [row for _, row in status.requests()]
        return Point(
            at=now,
            tokens_per_s=sum(load.tokens_per_s for load in loads),
            requests=len(rows),
            waiting=sum(row.phase in (RequestPhase.WAITING, RequestPhase.PREEMPTED) for row in rows),
            moving=sum(row.moving for row in rows),
            workers=tuple(loads),
        )

    def _rate(self, worker: WorkerReport) -> float:
        if worker.missing:
            return 0.0
        now = time.monotonic()
        then, total = self._before.get(worker.worker, (now, worker.tokens_total))
        self._before[worker.worker] = (now, worker.tokens_total)
        return max(0, worker.tokens_total - total) / max(0.1, now - then)

    async def next(self, timeout_s: float = 10.0) -> None:
        """Wait for the next sample, or for the time-out."""
        async with self.changed:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.changed.wait(), timeout_s)
