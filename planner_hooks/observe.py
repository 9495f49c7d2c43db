# SPDX-License-Identifier: Apache-2.0
"""Makes a ``Snapshot`` or a ``Capture`` of the workers' state: loads, requests, and the cost of past moves.

``look`` takes what is known at one moment, on the loop that the tables belong to; ``snapshot`` and ``capture`` may then
run in another thread. It also keeps output lengths of ended requests, which one state does not have. A missing worker
keeps its rows and ages until it counts as stale; one without any report does not appear. All times are ages, or of this
process's clock. ``join`` may be called at any time; nothing here does I/O or raises.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from components.migration.messages import MoveRecord, RequestRow
from components.status import WorkerReport
from planner_hooks.estimate import RemainingEstimate
from planner_hooks.metrics import Heard
from planner_hooks.rules import Cost
from planner_hooks.snapshot import NEVER_S, ActiveMove, Capture, Ints, Requests, RequestView, Snapshot, WorkerView
from planner_hooks.table import (
    BLOCKS,
    ELSEWHERE,
    FLAGS,
    FREE,
    KEY,
    LIMIT,
    OUTPUT,
    PRIORITY,
    PROMPT,
    RUNNING,
    SHIFT,
    WAITING,
    Columns,
    Register,
    Table,
)

_MEASURED = 50
"""Number of migrations from which the cost is measured."""
DECODE_ROLES = ("decode", "agg")
"""Roles of workers with movable requests."""


class Rows(Sequence[str]):
    """The requests of all workers; as a sequence, their ids. A hundred thousand of them are never listed."""

    def __init__(self, register: Register, keys: NDArray[np.int64]) -> None:
        self._rows = register.rows
        self.keys = keys

    def __len__(self) -> int:
        return len(self.keys)

    def row(self, at: int) -> RequestRow:
        """One request, with the counts of its last change."""
        return self._rows[int(self.keys[at])]

    def __getitem__(self, at: int) -> str:  # type: ignore[override]
        return self.row(at).request_id


@dataclass(frozen=True)
class Look:
    """What was known at one moment. Another thread may read it, until the next look."""

    heads: list[WorkerReport]
    """Decode workers that have told their state."""
    columns: Columns
    owners: Ints
    """Index of each request's worker."""
    rows: Rows
    index: Mapping[str, int]
    """Where a request is that moves, or has moved lately."""
    moves: tuple[MoveRecord, ...]
    active: tuple[ActiveMove, ...]


class Observer:
    """Call ``look`` at every decision."""

    def __init__(self, cost: Cost, clock: Callable[[], float] = time.monotonic) -> None:
        self._cost = cost
        self._clock = clock
        self._remaining = RemainingEstimate()
        self._register = Register()
        self._heard = Heard()

    def join(self, engines: Mapping[str, bytes]) -> None:
        """Take the planner's forward-pass metrics; a worker without new metrics becomes stale."""
        self._heard.update(engines, self._clock())

    def look(self, tables: Sequence[Table], moves: tuple[MoveRecord, ...], active: Iterable[ActiveMove] = ()) -> Look:
        """Take what is known now."""
        register = self._register
        for output_tokens in register.update(tables):
            self._remaining.finished(output_tokens)
        heads: list[WorkerReport] = []
        now = self._clock()
        owner_of = np.full(max(register.numbers.values(), default=0) + 1, -1, dtype=np.int32)
        for table in tables:
            head = table.head(now)
            if head.role in DECODE_ROLES and head.stats is not None and head.info is not None:
                owner_of[register.numbers[table]] = len(heads)
                heads.append(head)
        keys, flags = register.columns[KEY], register.columns[FLAGS].copy()
        owners = owner_of[keys >> SHIFT]
        for several in register.several.values():
            # The youngest report of one that has just moved is right.
            places = np.searchsorted(keys, several).tolist()
            here = [at for at in places if owners[at] >= 0 and not flags[at] & ELSEWHERE]
            flags[sorted(here, key=lambda at: heads[owners[at]].age_s)[1:]] |= ELSEWHERE
        kept = (flags < ELSEWHERE) & (owners >= 0)
        columns = register.columns[:, kept]
        active = tuple(active)
        ids = [*(move.request_id for move in active), *(move.request_id for move in moves)]
        wanted = {key: request_id for request_id in dict.fromkeys(ids) for key in register.keys(request_id)}
        found = np.flatnonzero(np.isin(columns[KEY], list(wanted))).tolist() if wanted else []
        index = {wanted[int(columns[KEY, at])]: at for at in found}
        return Look(heads, columns, owners[kept], Rows(register, columns[KEY]), index, moves, active)

    def capture(self, look: Look) -> Capture:
        """The state in readable form."""
        columns = self._columns(look)
        came_from = {move.request_id: move.source for move in look.moves if move.ok}
        requests = []
        for at, owner in enumerate(look.owners.tolist()):
            row = look.rows.row(at)
            requests.append(
                RequestView(
                    request_id=row.request_id,
                    worker=look.heads[owner].worker,
                    phase=row.phase,
                    need_tokens=int(columns.need[at]),
                    kv_tokens=int(columns.kv[at]),
                    remaining_tokens=float(columns.remaining[at]),
                    priority=-row.priority,
                    not_migratable=row.not_migratable or None,
                    since_move_s=float(columns.since_move[at]),
                    came_from=came_from.get(row.request_id, ""),
                    moving=row.moving,
                )
            )
        return msgspec.structs.replace(self._head(look), requests=tuple(requests))

    def snapshot(self, look: Look, stale_after_s: float) -> Snapshot:
        """The input of policies, without the readable form of requests: that takes longer than everything else."""
        return Snapshot.joined(self._head(look), self._columns(look), stale_after_s, look.index)

    def _columns(self, look: Look) -> Requests:
        columns, count = look.columns, len(look.owners)
        since, came_from = np.full(count, NEVER_S), np.full(count, len(look.heads), dtype=np.int32)
        workers = {head.worker: at for at, head in enumerate(look.heads)}
        for move in look.moves:
            if move.ok and (at := look.index.get(move.request_id)) is not None:
                since[at], came_from[at] = move.age_s, workers.get(move.source, len(workers))
        blocks = np.array([head.info.block_size if head.info else 0 for head in look.heads] or [0])
        outputs, flags = columns[OUTPUT].astype(np.float64), columns[FLAGS]
        return Requests(
            ids=look.rows,
            worker=look.owners,
            kv=(columns[BLOCKS] * blocks[look.owners]).astype(np.float64),
            need=columns[PROMPT] + outputs,
            remaining=np.minimum(self._remaining.of(outputs), np.maximum(0.0, columns[LIMIT] - outputs)),
            # In vLLM smaller numbers are more important.
            priority=-columns[PRIORITY].astype(np.int32),
            running=flags & RUNNING != 0,
            waiting=flags & WAITING != 0,
            free=flags & FREE != 0,
            since_move=since,
            came_from=came_from,
        )

    def _head(self, look: Look) -> Capture:
        now = self._clock()
        bytes_per_s, overhead_s, downtime_s = self._measured([move for move in look.moves if move.ok and move.bytes])
        return Capture(
            time_s=now,
            workers=tuple(self._worker(head, now) for head in look.heads),
            active=look.active,
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
