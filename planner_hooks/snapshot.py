# SPDX-License-Identifier: Apache-2.0
"""Input of a policy: readable views, and the same as columns for fast decisions.

``Capture`` is the readable form (JSON on disk, ``dynamo policy explain``). ``Snapshot`` has the same facts as
numpy columns; policies only read it. ``after`` returns the snapshot with some moves begun: the request is still at
its source, its destination has reserved room, and no policy may plan it again.

Token counts are KV tokens (blocks times block size). A worker without a recent report is not ``fresh``: it is neither
source nor destination.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import msgspec
import numpy as np
from numpy.typing import NDArray

from components.engine.protocol import RequestPhase
from planner_hooks.plan import Move

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]
Bools = NDArray[np.bool_]
WAITS = (RequestPhase.WAITING, RequestPhase.PREEMPTED)
NEVER_S = 1e18
"""Age, in seconds, of something that has never happened: large, finite, and valid JSON."""


class WorkerView(msgspec.Struct, frozen=True, omit_defaults=True):
    """One decode worker. ``worker`` is its name: the last eight digits of its instance id."""

    worker: str
    capacity_tokens: int
    held_tokens: int = 0
    """KV in use, landing requests included."""
    queued_tokens: int = 0
    """KV that waiting and preempted requests will need."""
    running: int = 0
    waiting: int = 0
    max_seqs: int = 256
    step_s: float = 0.0
    """Duration of a forward step; 0 when idle."""
    draining: bool = False
    """The worker gets no new requests and empties itself."""
    report_age_s: float = 0.0
    kv_bytes_per_token: int = 0


class RequestView(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """One request on a decode worker. Without containers, so that the garbage collector skips them."""

    request_id: str
    worker: str
    phase: RequestPhase
    need_tokens: int
    """KV that it needs to run: prompt and output so far."""
    kv_tokens: int = 0
    """KV in use; 0 while it waits."""
    remaining_tokens: float = 0.0
    """Expected further output tokens."""
    priority: int = 0
    """Larger is more important."""
    not_migratable: str | None = None
    since_move_s: float = NEVER_S
    came_from: str = ""
    moving: bool = False


class ActiveMove(msgspec.Struct, frozen=True):
    """A running migration; ``tokens`` are those that the destination does not show yet."""

    request_id: str
    src: str
    dst: str
    tokens: int = 0
    copies: bool = True
    """False for a request that waited at the begin of its move and has no KV."""


class Capture(msgspec.Struct, frozen=True, omit_defaults=True):
    """The whole state at one moment. ``bytes_per_s`` is the measured speed of past migrations."""

    time_s: float
    workers: tuple[WorkerView, ...]
    requests: tuple[RequestView, ...] = ()
    active: tuple[ActiveMove, ...] = ()
    bytes_per_s: float = 1e9
    overhead_s: float = 0.1
    """Time of a migration that is independent of its size."""
    downtime_s: float = 0.05


@dataclass(frozen=True)
class Requests:
    """Columns of all requests; see ``Snapshot``, and ``RequestView`` for their meaning."""

    ids: Sequence[str]
    worker: Ints
    kv: Floats
    need: Floats
    remaining: Floats
    priority: Ints
    running: Bools
    waiting: Bools
    free: Bools
    """Migratable, and not moving as far as its worker knows."""
    since_move: Floats
    came_from: Ints


@dataclass(frozen=True)
class Snapshot:
    """Columns over workers (``w_``) and requests (``r_``); see the views for their meaning."""

    time_s: float
    worker_ids: tuple[str, ...]
    w_capacity: Floats
    w_held: Floats
    w_queued: Floats
    w_running: Floats
    w_waiting: Floats
    w_max_seqs: Floats
    w_step_s: Floats
    w_fresh: Bools
    w_leaving: Bools
    w_inbound: Floats
    """Incoming tokens, not yet part of ``w_held``."""
    w_outbound: Floats
    """Outgoing tokens, still part of ``w_held`` or ``w_queued``."""
    w_moves: Ints
    """Number of KV migrations of the worker."""
    request_ids: Sequence[str]
    r_worker: Ints
    r_kv: Floats
    r_need: Floats
    r_remaining: Floats
    r_priority: Ints
    r_running: Bools
    r_waiting: Bools
    r_free: Bools
    """Migratable and not moving."""
    r_since_move: Floats
    r_came_from: Ints
    """Index of its previous worker, or ``len(worker_ids)``."""
    bytes_per_token: float
    bytes_per_s: float
    overhead_s: float
    downtime_s: float
    pairs: Mapping[tuple[int, int], int] = field(default_factory=dict)
    """Running KV migrations by source and destination; 0 where only waiting requests move."""
    planned: int = 0
    """Moves planned in this tick so far."""
    by_worker: tuple[NDArray[np.int64], NDArray[np.int64]] = field(default=None, repr=False)  # type: ignore[assignment]
    """Request rows sorted by worker, and the first row of each worker; computed when not given."""

    def __post_init__(self) -> None:
        if self.by_worker is None:
            # A radix sort on 16 bits is several times faster than others.
            small = self.r_worker.astype(np.int16) if len(self.worker_ids) < 2**15 else self.r_worker
            order = np.argsort(small, kind="stable")
            begins = np.zeros(len(self.worker_ids) + 1, dtype=np.int64)
            np.cumsum(np.bincount(self.r_worker, minlength=len(self.worker_ids)), out=begins[1:])
            object.__setattr__(self, "by_worker", (order, begins))

    def rows_of(self, worker: int) -> NDArray[np.int64]:
        """Requests on a worker."""
        order, begins = self.by_worker
        return order[begins[worker] : begins[worker + 1]]

    @cached_property
    def w_accepts(self) -> Bools:
        """Mask of workers that may get requests."""
        accepts: Bools = self.w_fresh & ~self.w_leaving
        return accepts

    @cached_property
    def index(self) -> dict[str, int]:
        """Worker id to column index."""
        return {worker: i for i, worker in enumerate(self.worker_ids)}

    def after(self, moves: Iterable[Move], leaving: Iterable[str] = ()) -> Snapshot:
        """The snapshot after the begin of these moves and retirements."""
        moves = tuple(moves)
        gone = [self.index[worker] for worker in leaving if worker in self.index]
        if not moves and not gone:
            return self
        w_inbound, w_outbound, w_moves = self.w_inbound.copy(), self.w_outbound.copy(), self.w_moves.copy()
        w_leaving, r_free = self.w_leaving.copy(), self.r_free.copy()
        pairs = Counter(self.pairs)
        for move in moves:
            row, src, dst = move.row, self.index[move.src], self.index[move.dst]
            w_inbound[dst] += self.r_need[row]
            w_outbound[src] += self.r_need[row] if self.r_waiting[row] else self.r_kv[row]
            copies = int(not self.r_waiting[row])
            w_moves[src] += copies
            w_moves[dst] += copies
            r_free[row] = False
            pairs[src, dst] += copies
        w_leaving[gone] = True
        return replace(
            self,
            w_inbound=w_inbound,
            w_outbound=w_outbound,
            w_moves=w_moves,
            w_leaving=w_leaving,
            r_free=r_free,
            pairs=pairs,
            planned=self.planned + len(moves),
        )

    @staticmethod
    def of(capture: Capture, stale_after_s: float = math.inf) -> Snapshot:
        """Columns of a capture. Requests on unknown workers are left out."""
        index = {view.worker: i for i, view in enumerate(capture.workers)}
        rows = [view for view in capture.requests if view.worker in index]
        requests = Requests(
            ids=[v.request_id for v in rows],
            worker=np.array([index[v.worker] for v in rows], dtype=np.int32),
            kv=np.array([v.kv_tokens for v in rows], dtype=np.float64),
            need=np.array([v.need_tokens for v in rows], dtype=np.float64),
            remaining=np.array([v.remaining_tokens for v in rows], dtype=np.float64),
            priority=np.array([v.priority for v in rows], dtype=np.int32),
            running=np.array([v.phase is RequestPhase.DECODE for v in rows], dtype=bool),
            waiting=np.array([v.phase in WAITS for v in rows], dtype=bool),
            free=np.array([v.not_migratable is None and not v.moving for v in rows], dtype=bool),
            since_move=np.array([v.since_move_s for v in rows], dtype=np.float64),
            came_from=np.array([index.get(v.came_from, len(index)) for v in rows], dtype=np.int32),
        )
        return Snapshot.joined(capture, requests, stale_after_s)

    @staticmethod
    def joined(
        capture: Capture, requests: Requests, stale_after_s: float = math.inf, row_of: Mapping[str, int] | None = None
    ) -> Snapshot:
        """Columns of the workers and moves of a capture, with those of its requests.

        ``row_of``: rows of those that move.
        """
        workers = capture.workers
        index = {view.worker: i for i, view in enumerate(workers)}
        inbound, outbound = np.zeros(len(workers)), np.zeros(len(workers))
        moves, pairs = np.zeros(len(workers), dtype=np.int32), Counter[tuple[int, int]]()
        free = requests.free.copy()
        if row_of is None:
            row_of = {request_id: row for row, request_id in enumerate(requests.ids)}
        for move in capture.active:
            src, dst, row = index.get(move.src), index.get(move.dst), row_of.get(move.request_id)
            if row is not None:
                free[row] = False
            if src is not None:
                moves[src] += move.copies
                outbound[src] += 0.0 if row is None else (requests.need if requests.waiting[row] else requests.kv)[row]
            if dst is not None:
                moves[dst] += move.copies
                inbound[dst] += move.tokens
            if src is not None and dst is not None:
                pairs[src, dst] += move.copies

        def column(values: Iterable[float]) -> Floats:
            return np.fromiter(values, dtype=np.float64)

        bytes_per_token = [view.kv_bytes_per_token for view in workers if view.kv_bytes_per_token]
        return Snapshot(
            time_s=capture.time_s,
            worker_ids=tuple(index),
            w_capacity=column(max(1, v.capacity_tokens) for v in workers),
            w_held=column(v.held_tokens for v in workers),
            w_queued=column(v.queued_tokens for v in workers),
            w_running=column(v.running for v in workers),
            w_waiting=column(v.waiting for v in workers),
            w_max_seqs=column(max(1, v.max_seqs) for v in workers),
            w_step_s=column(v.step_s for v in workers),
            w_fresh=np.array([v.report_age_s <= stale_after_s and v.capacity_tokens > 0 for v in workers], dtype=bool),
            w_leaving=np.array([v.draining for v in workers], dtype=bool),
            w_inbound=inbound,
            w_outbound=outbound,
            w_moves=moves,
            request_ids=requests.ids,
            r_worker=requests.worker,
            r_kv=requests.kv,
            r_need=requests.need,
            r_remaining=requests.remaining,
            r_priority=requests.priority,
            r_running=requests.running,
            r_waiting=requests.waiting,
            r_free=free,
            r_since_move=requests.since_move,
            r_came_from=requests.came_from,
            bytes_per_token=float(max(bytes_per_token, default=0)),
            bytes_per_s=capture.bytes_per_s,
            overhead_s=capture.overhead_s,
            downtime_s=capture.downtime_s,
            pairs=pairs,
        )
