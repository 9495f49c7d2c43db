# SPDX-License-Identifier: Apache-2.0
"""Makes a ``Capture`` from the workers' state: loads, the table of requests, and the cost of past moves.

It also keeps output lengths of ended requests, which one status does not have. A missing worker keeps its rows and
ages until it counts as stale; one without any report does not appear. All times are ages, or of this process's clock.
``join`` may be called while ``capture`` runs in another thread; neither does I/O or raises.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping

import msgspec
import numpy as np

from components.migration.messages import MoveRecord, RequestRow
from components.status import Status, WorkerReport
from planner_hooks.estimate import RemainingEstimate
from planner_hooks.metrics import Heard
from planner_hooks.rules import Cost
from planner_hooks.snapshot import NEVER_S, ActiveMove, Capture, RequestView, WorkerView

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
        self._outputs: dict[str, int] = {}
        self._workers: dict[str, str] = {}
        """Last known worker of each request."""
        self._heard = Heard()

    def join(self, engines: Mapping[str, bytes]) -> None:
        """Take the planner's forward-pass metrics; a worker without new metrics becomes stale."""
        self._heard.update(engines, self._clock())

    def capture(self, status: Status, active: Iterable[ActiveMove] = ()) -> Capture:
        """The input of policies."""
        now = self._clock()
        there: dict[str, int] = {
            row.request_id: row.output_tokens for worker in status.workers for row in worker.requests
        }
        answering = {worker.worker for worker in status.workers if not worker.missing}
        for gone in set(self._outputs) - set(there):
            made = self._outputs.pop(gone)
            # A removed worker has not reported the end of its requests.
            if self._workers.pop(gone) in answering:
                self._remaining.finished(made)
        self._outputs |= there
        self._workers |= {row.request_id: worker.worker for worker in status.workers for row in worker.requests}
        moved = {move.request_id: move for move in status.moves if move.ok}
        decode = [w for w in status.workers if w.role in DECODE_ROLES and w.stats is not None and w.info is not None]
        # Parallel lists instead of tuples, which the garbage collector would traverse again and again.
        rows: list[RequestRow] = []
        owners: list[WorkerReport] = []
        seen: set[str] = set()
        # When two workers list a request that has just moved, the younger report is right.
        for worker in sorted(decode, key=lambda worker: worker.age_s):
            mine = [row for row in worker.here() if row.request_id not in seen]
            seen.update(row.request_id for row in mine)
            rows += mine
            owners += [worker] * len(mine)
        # For all at once: single calls would take most of the time of a large table.
        remaining = self._remaining.of(np.array([row.output_tokens for row in rows], dtype=float)).tolist()
        requests = [
            RequestView(
                request_id=row.request_id,
                worker=worker.worker,
                phase=row.phase,
                need_tokens=row.prompt_tokens + row.output_tokens,
                kv_tokens=row.kv_blocks * _block_size(worker),
                remaining_tokens=expected
                if row.max_tokens is None
                else min(expected, max(0.0, row.max_tokens - row.output_tokens)),
                # In vLLM smaller numbers are more important.
                priority=-row.priority,
                not_migratable=row.not_migratable or None,
                moving=row.moving,
            )
            for worker, row, expected in zip(owners, rows, remaining, strict=True)
        ]
        if moved:
            requests = [_after_move(view, moved.get(view.request_id)) for view in requests]
        bytes_per_s, overhead_s, downtime_s = self._measured([move for move in status.moves if move.ok and move.bytes])
        return Capture(
            time_s=now,
            workers=tuple(self._worker(worker, now) for worker in decode),
            requests=tuple(requests),
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


def _after_move(view: RequestView, move: MoveRecord | None) -> RequestView:
    if move is None:
        return view
    return msgspec.structs.replace(view, since_move_s=move.age_s, came_from=move.source)
