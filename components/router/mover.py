# SPDX-License-Identifier: Apache-2.0
"""Migrations of a router's requests: one on demand, or all that live on a worker.

``move`` always has a record, of a failure too; ``drain`` raises ``DeadlineExceeded``. Threading: the router's loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque

import msgspec

from components.errors import DeadlineExceeded, MigrateError, NoRoom, RequestNotFound
from components.messages import Mode, MoveRecord
from components.metrics.router import RouterMetrics
from components.migration.move import migrate
from components.router.limits import MoveLimits
from components.router.stream import Stream
from components.router.workers import Worker, WorkerPool
from components.serve.config import RouterConfig

logger = logging.getLogger(__name__)


class Mover:
    """See the module docstring. ``streams`` are the router's, by request id."""

    def __init__(
        self, config: RouterConfig, pool: WorkerPool, streams: dict[str, Stream], metrics: RouterMetrics
    ) -> None:
        self._config = config
        self._pool = pool
        self._streams = streams
        self._metrics = metrics
        self._limits = MoveLimits(config.max_migrations_per_worker, config.max_migrations_per_pair)
        self.moves: deque[MoveRecord] = deque(maxlen=1000)
        """The last ones."""

    async def move(self, stream: Stream, target: Worker, mode: Mode, planned_source: str = "") -> MoveRecord:
        """Move a request, falling back to the next mode when one fails for good. Waits for its turn."""
        source = stream.owner.worker.instance if stream.owner else target.instance
        async with self._limits.slot(source, target.instance):
            return await self._move(stream, target, mode, planned_source)

    async def _move(self, stream: Stream, target: Worker, mode: Mode, planned_source: str) -> MoveRecord:
        rounds = self._config.max_precopy_rounds
        mode = max(mode, Mode(self._config.migration_mode), key=list(Mode).index)
        record = await migrate(stream, target, mode, rounds, planned_source)
        if not record.ok and mode is Mode.LIVE and not record.reason.startswith(("no_room", "not_migratable", "the ")):
            reason = record.reason
            self._metrics.fell_back(mode, reason)
            record = await migrate(stream, target, Mode.STOP_AND_COPY, rounds)
            record = msgspec.structs.replace(record, reason=reason)
        self.moves.append(record)
        self._metrics.moved(record)
        logger.info(
            "request %s: %s from %s to %s %s, downtime %.1f ms, added stall %.1f ms, %d bytes over %s %s",
            *(record.request_id, record.mode, record.source, record.target, "done" if record.ok else "failed"),
            *(record.downtime_s * 1e3, record.added_stall_s * 1e3, record.bytes, record.lane, record.reason),
        )
        return record

    async def drain(self, worker: Worker, timeout_s: float) -> list[MoveRecord]:
        """Move every request of ours away from a worker. Raises ``DeadlineExceeded`` when some stay."""
        began = time.monotonic()
        try:
            moved = await self._drain(worker, timeout_s)
        except MigrateError:
            self._metrics.drained(time.monotonic() - began, False)
            raise
        self._metrics.drained(time.monotonic() - began, True)
        return moved

    async def _drain(self, worker: Worker, timeout_s: float) -> list[MoveRecord]:
        worker.held_back = True
        limit = asyncio.Semaphore(self._config.max_migrations_per_worker)
        moved: list[MoveRecord] = []

        async def leave(stream: Stream) -> None:
            async with limit:
                try:
                    target = self._pool.pick("decode", (worker.instance,), reachable=True)
                except NoRoom as error:
                    logger.warning("%s cannot leave %s: %s", stream.request.request_id, worker.name, error)
                    await asyncio.sleep(0.5)
                    return
                record = await self.move(stream, target, Mode.LIVE)
                if not record.ok and record.reason.startswith(RequestNotFound.code):
                    # It has just ended there, which its stream is about to tell.
                    return
                if not record.ok and not stream.finished:
                    record = await self.move(stream, target, Mode.REPLAY)
                moved.append(record)

        end = asyncio.get_running_loop().time() + timeout_s
        while asyncio.get_running_loop().time() < end:
            here = [s for s in self._streams.values() if s.owner and s.owner.worker is worker and not s.finished]
            taken_back = not (worker.held_back or worker.draining)
            if not here or taken_back:
                return moved
            await asyncio.gather(*(leave(stream) for stream in here))
            await asyncio.sleep(0.05)
        raise DeadlineExceeded(f"worker {worker.name} still has requests after {timeout_s:g} s")
