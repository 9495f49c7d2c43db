# SPDX-License-Identifier: Apache-2.0
"""Makes a ``Snapshot`` or a ``Capture`` of the workers' state: loads, requests, and the cost of past moves.

It also keeps output lengths of ended requests, which one status does not have. A missing worker keeps its rows and
ages until it counts as stale; one without any report does not appear. All times are ages, or of this process's clock.
``join`` may be called while ``capture`` runs in another thread; neither does I/O or raises.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping

import msgspec
import numpy as np

from components.engine.kv import RequestId
from components.engine.protocol import RequestPhase
from components.migration.messages import MoveRecord, RequestRow
from components.status import Status, WorkerReport
from planner_hooks.estimate import RemainingEstimate
from planner_hooks.metrics import Heard
from planner_hooks.rules import Cost
from planner_hooks.snapshot import (
    NEVER_S,
    WAITS,
    ActiveMove,
    Capture,
    Ints,
    Requests,
    RequestView,
    Snapshot,
    WorkerView,
)

_MEASURED = 50
"""Number of migrations from which the cost is measured."""
DECODE_ROLES = ("decode", "agg")
"""Roles of workers with movable requests."""


class Observer:
    """Call ``capture`` with every status, in order."""

    def __init__(self, cost: Cost, clock: Callable[[], float] = time.monotonic) -> None:
        self._cost = cost
        self._clock = clock
        self._remaining = RemainingEstimate()
        self._seen: dict[str, tuple[tuple[RequestRow, ...], set[int]]] = {}
        """Rows of each worker in the last status, and their identities: a row lives as long as its request is there."""
        self._heard = Heard()

    def join(self, engines: Mapping[str, bytes]) -> None:
        """Take the planner's forward-pass metrics; a worker without new metrics becomes stale."""
        self._heard.update(engines, self._clock())

    def capture(self, status: Status, active: Iterable[ActiveMove] = ()) -> Capture:
        """The state in readable form."""
        rows, owners, workers, odd = self._rows(status)
        columns = self._columns(status, rows, owners, workers, odd)
        names = [worker.worker for worker in workers]
        found = zip(rows, columns.worker, columns.need, columns.kv, columns.remaining, columns.since_move, strict=True)
        requests = [
            RequestView(
                request_id=row.request_id,
                worker=names[worker],
                phase=row.phase,
                need_tokens=int(need),
                kv_tokens=int(kv),
                remaining_tokens=float(remaining),
                priority=-row.priority,
                not_migratable=row.not_migratable or None,
                since_move_s=float(since),
                moving=row.moving,
            )
            for row, worker, need, kv, remaining, since in found
        ]
        came_from = {move.request_id: move.source for move in status.moves if move.ok}
        requests = [
            msgspec.structs.replace(view, came_from=came_from[view.request_id])
            if view.request_id in came_from
            else view
            for view in requests
        ]
        return msgspec.structs.replace(self._head(status, workers, active), requests=tuple(requests))

    def snapshot(self, status: Status, active: Iterable[ActiveMove], stale_after_s: float) -> Snapshot:
        """The input of policies, without the readable form of requests: that takes longer than everything else."""
        rows, owners, workers, odd = self._rows(status)
        requests = self._columns(status, rows, owners, workers, odd)
        return Snapshot.joined(self._head(status, workers, active), requests, stale_after_s)

    def _rows(self, status: Status) -> tuple[list[RequestRow], Ints, list[WorkerReport], list[int]]:
        """Rows in engines of decode workers, the index of each one's worker, those workers, and unusual rows."""
        self._count_ended(status)
        decode = [w for w in status.workers if w.role in DECODE_ROLES and w.stats is not None and w.info is not None]
        # When two workers list a request that has just moved, the younger report is right.
        decode.sort(key=lambda worker: worker.age_s)
        rows = list(itertools.chain.from_iterable(worker.requests for worker in decode))
        owners = np.repeat(np.arange(len(decode), dtype=np.int32), [len(worker.requests) for worker in decode])
        landing = RequestPhase.LANDING
        odd = _odd(rows)
        out = {at for at in odd if rows[at].relayed_from or rows[at].phase is landing}
        if len({row.request_id for row in rows}) < len(rows):
            seen: set[RequestId] = set()
            for at, row in enumerate(rows):
                if at not in out:
                    out |= {at} if row.request_id in seen else set()
                    seen.add(row.request_id)
        if out:
            kept = np.setdiff1d(np.arange(len(rows)), list(out))
            rows, owners = [rows[at] for at in kept.tolist()], owners[kept]
            odd = _odd(rows)
        return rows, owners, decode, odd

    def _count_ended(self, status: Status) -> None:
        """Learn from the outputs of requests that have ended. A removed worker has not reported their ends."""
        seen = {worker.worker: (worker.requests, set(map(id, worker.requests))) for worker in status.workers}
        answering = {worker.worker for worker in status.workers if not worker.missing}
        ended = [
            row
            for worker, (rows, known) in self._seen.items()
            if worker in answering and (gone := known - seen[worker][1])
            for row in rows
            if id(row) in gone
        ]
        if ended:
            there = {row.request_id for worker in status.workers for row in worker.requests}
            for row in ended:
                if row.request_id not in there:
                    self._remaining.finished(row.output_tokens)
        self._seen = seen

    def _columns(
        self, status: Status, rows: list[RequestRow], worker: Ints, workers: list[WorkerReport], odd: list[int]
    ) -> Requests:
        outputs = np.array([row.output_tokens for row in rows], dtype=np.float64)
        running, waiting, free = np.array([[True], [False], [True]]).repeat(len(rows), axis=1)
        for at in odd:
            row = rows[at]
            running[at], waiting[at] = row.phase is RequestPhase.DECODE, row.phase in WAITS
            free[at] = not (row.not_migratable or row.moving)
        # None becomes NaN, which fmin passes over.
        most = np.array([row.max_tokens for row in rows], dtype=np.float64)
        ids = [row.request_id for row in rows]
        blocks = np.array([_block_size(report) for report in workers] or [0], dtype=np.float64)
        since, came_from = np.full(len(rows), NEVER_S), np.full(len(rows), len(workers), dtype=np.int32)
        moved = {move.request_id: move for move in status.moves if move.ok}
        index = {report.worker: at for at, report in enumerate(workers)}
        for at in [at for at, request_id in enumerate(ids) if request_id in moved] if moved else ():
            move = moved[ids[at]]
            since[at], came_from[at] = move.age_s, index.get(move.source, len(workers))
        return Requests(
            ids=ids,
            worker=worker,
            kv=np.array([row.kv_blocks for row in rows], dtype=np.float64) * blocks[worker],
            need=np.array([row.prompt_tokens for row in rows], dtype=np.float64) + outputs,
            remaining=np.fmin(self._remaining.of(outputs), np.maximum(0.0, most - outputs)),
            # In vLLM smaller numbers are more important.
            priority=-np.array([row.priority for row in rows], dtype=np.int32),
            running=running,
            waiting=waiting,
            free=free,
            since_move=since,
            came_from=came_from,
        )

    def _head(self, status: Status, workers: list[WorkerReport], active: Iterable[ActiveMove]) -> Capture:
        now = self._clock()
        bytes_per_s, overhead_s, downtime_s = self._measured([move for move in status.moves if move.ok and move.bytes])
        return Capture(
            time_s=now,
            workers=tuple(self._worker(worker, now) for worker in workers),
            active=tuple(active),
            bytes_per_s=bytes_per_s,
            overhead_s=overhead_s,
            downtime_s=downtime_s,
        )

    def _worker(self, worker: WorkerReport, now: float) -> WorkerView:
        stats, info = worker.stats, worker.info
        if stats is None or info is None:
            return WorkerView(worker.worker, capacity_tokens=0, report_age_s=NEVER_S)
        return WorkerView(
            worker=worker.worker,
            capacity_tokens=stats.total_blocks * info.block_size,
            held_tokens=(stats.total_blocks - stats.free_blocks) * info.block_size,
            queued_tokens=max(stats.queued_prefill_tokens, self._heard.queued_tokens.get(worker.worker, 0)),
            running=stats.running,
            waiting=stats.waiting,
            max_seqs=info.max_num_seqs,
            step_s=stats.step_s,
            draining=worker.cordoned,
            report_age_s=max(worker.age_s, self._heard.age_s(worker.worker, now)),
            kv_bytes_per_token=info.kv_bytes_per_token,
        )

    def _measured(self, moves: list[MoveRecord]) -> tuple[float, float, float]:
        """Bytes per second, fixed seconds and downtime from the last migrations; before any, the file's values."""
        moves = moves[-_MEASURED:]
        if not moves:
            return self._cost.bytes_per_s, self._cost.overhead_s, self._cost.downtime_s
        # The shortest one is nearly pure overhead; the extra time of others is for their bytes.
        overhead = min(move.total_s for move in moves)
        beyond = sum(move.total_s - overhead for move in moves)
        size = sum(move.bytes for move in moves)
        speed = size / beyond if beyond > 1e-3 else self._cost.bytes_per_s
        return speed, overhead, statistics.median(move.downtime_s for move in moves)


def _block_size(worker: WorkerReport) -> int:
    return worker.info.block_size if worker.info is not None else 0


def _odd(rows: list[RequestRow]) -> list[int]:
    """Rows that do not simply decode: few, so that all others need only one look."""
    decodes = RequestPhase.DECODE
    return [
        at
        for at, row in enumerate(rows)
        if row.phase is not decodes or row.not_migratable or row.moving or row.relayed_from
    ]
