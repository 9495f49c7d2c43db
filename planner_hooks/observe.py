# SPDX-License-Identifier: Apache-2.0
"""Makes a ``Snapshot`` or a ``Capture`` of the workers' state: loads, requests, and the cost of past moves.

``look`` takes what is known at one moment, on the loop that the tables belong to; ``snapshot`` and ``capture`` may then
run in another thread. It also keeps output lengths of ended requests, which one state does not have. A missing worker
keeps its rows and ages until it counts as stale; one without any report does not appear. All times are ages, or of this
process's clock. ``join`` may be called at any time; nothing here does I/O or raises.
"""

from __future__ import annotations

import bisect
import itertools
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
from planner_hooks.table import Places, Records, Table, joined

_MEASURED = 50
"""Number of migrations from which the cost is measured."""
DECODE_ROLES = ("decode", "agg")
"""Roles of workers with movable requests."""


class Rows(Sequence[str]):
    """The requests of all workers; as a sequence, their ids. A hundred thousand of them are never listed."""

    def __init__(self, tables: list[list[RequestRow]], kept: NDArray[np.int64]) -> None:
        self._tables = tables
        self._begins = list(itertools.accumulate(map(len, tables), initial=0))
        self.kept = kept
        """Places of those that count, over all tables."""

    def __len__(self) -> int:
        return len(self.kept)

    def row(self, at: int) -> RequestRow:
        """One request, with the counts of its last change."""
        place = int(self.kept[at])
        table = bisect.bisect_right(self._begins, place) - 1
        return self._tables[table][place - self._begins[table]]

    def __getitem__(self, at: int) -> str:  # type: ignore[override]
        return self.row(at).request_id

    def index_of(self, table: int, place: int) -> int | None:
        """Index of a request by its table and its place there; None for one that does not count."""
        at = int(np.searchsorted(self.kept, whole := self._begins[table] + place))
        return at if at < len(self) and self.kept[at] == whole else None


@dataclass(frozen=True)
class Look:
    """What was known at one moment. Another thread may read it."""

    heads: list[WorkerReport]
    """Decode workers that have told their state."""
    records: Records
    owners: Ints
    """Index of each record's worker."""
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
        self._places = Places()
        self._heard = Heard()

    def join(self, engines: Mapping[str, bytes]) -> None:
        """Take the planner's forward-pass metrics; a worker without new metrics becomes stale."""
        self._heard.update(engines, self._clock())

    def look(self, tables: Sequence[Table], moves: tuple[MoveRecord, ...], active: Iterable[ActiveMove] = ()) -> Look:
        """Take what is known now."""
        for row in self._places.update(tables):
            self._remaining.finished(row.output_tokens)
        heads, chosen, now = [], [], self._clock()
        for table in tables:
            head = table.head(now)
            if head.role in DECODE_ROLES and head.stats is not None and head.info is not None:
                heads.append(head)
                chosen.append(table)
        records = joined([table.columns for table in chosen])
        begins = np.cumsum([0, *(len(table.columns) for table in chosen)])
        at = {table: number for number, table in enumerate(chosen)}
        for request_id, several in self._places.several.items():
            # The youngest report of one that has just moved is right.
            places = [(at[t], place) for t in dict.fromkeys(several) if t in at for place in t.places(request_id)]
            here = [(n, place) for n, place in places if not records["elsewhere"][begins[n] + place]]
            for number, place in sorted(here, key=lambda found: heads[found[0]].age_s)[1:]:
                records["elsewhere"][begins[number] + place] = True
        rows = Rows([table.rows for table in chosen], np.flatnonzero(~records["elsewhere"]))
        owners = np.repeat(np.arange(len(chosen), dtype=np.int32), np.diff(begins))
        active = tuple(active)
        index = {}
        for request_id in {*(move.request_id for move in active), *(move.request_id for move in moves)}:
            for table in self._places.of(request_id):
                for place in table.places(request_id) if table in at else ():
                    if (found := rows.index_of(at[table], place)) is not None:
                        index[request_id] = found
        return Look(heads, records[rows.kept], owners[rows.kept], rows, index, moves, active)

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
        records = look.records
        since, came_from = np.full(len(records), NEVER_S), np.full(len(records), len(look.heads), dtype=np.int32)
        workers = {head.worker: at for at, head in enumerate(look.heads)}
        for move in look.moves:
            if move.ok and (at := look.index.get(move.request_id)) is not None:
                since[at], came_from[at] = move.age_s, workers.get(move.source, len(workers))
        blocks = np.array([head.info.block_size if head.info else 0 for head in look.heads] or [0])
        outputs = records["output_tokens"].astype(np.float64)
        return Requests(
            ids=look.rows,
            worker=look.owners,
            kv=(records["kv_blocks"] * blocks[look.owners]).astype(np.float64),
            need=records["prompt_tokens"] + outputs,
            # Without a limit of tokens it is NaN, which fmin passes over.
            remaining=np.fmin(self._remaining.of(outputs), np.maximum(0.0, records["max_tokens"] - outputs)),
            # In vLLM smaller numbers are more important.
            priority=-records["priority"].astype(np.int32),
            running=records["running"],
            waiting=records["waiting"],
            free=records["free"],
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
