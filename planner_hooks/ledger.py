# SPDX-License-Identifier: Apache-2.0
"""Bookkeeping of one plan: projected loads, used limits, accepted moves.

Virtual usage is one number for everything that fills a worker (Llumnix, OSDI'24): KV in use, KV that queued requests
will need, incoming minus outgoing KV, and seats in the batch. A leaving worker counts as infinitely loaded.

A destination is checked against its KV in use plus everything promised to it: room that its outgoing requests will
free counts only when it is free.

A waiting request has no KV: its move only sends its tokens. Limits for each worker and pair are about copies and do
not apply to it; the limits of a destination and of each tick do.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from components.migration.messages import Mode
from planner_hooks.plan import Hold, HoldReason, Move, Plan
from planner_hooks.rules import Rules
from planner_hooks.snapshot import Bools, Floats, Snapshot

_SHARED = 2.0
"""KV of all requests over the KV that the worker holds."""


class Ledger:
    """Begins with the running moves of the snapshot; ``move`` adds more."""

    def __init__(self, snapshot: Snapshot, rules: Rules, policy: str) -> None:
        self.snapshot = snapshot
        self.rules = rules
        self.policy = policy
        self.moves: list[Move] = []
        self.holds: list[Hold] = []
        self._free = snapshot.r_free.copy()
        self._pairs = Counter(snapshot.pairs)
        self._w_moves = snapshot.w_moves.copy()
        self._promised = snapshot.w_held + snapshot.w_queued + snapshot.w_inbound
        self._load = self._promised - snapshot.w_outbound
        self._seats = snapshot.w_running + snapshot.w_waiting
        count = len(snapshot.worker_ids)
        usage = np.maximum(self._load / snapshot.w_capacity, self._seats / snapshot.w_max_seqs)
        inside = np.bincount(snapshot.r_worker, weights=snapshot.r_kv, minlength=count)
        self.shares: Bools = inside > _SHARED * np.maximum(snapshot.w_held, 1.0)
        """Workers whose requests have most of their KV in common: alone, each would need far more than it leaves."""
        self.usage: Floats = np.where(snapshot.w_leaving, np.inf, usage)

    def _usage_of(self, worker: int) -> float:
        s = self.snapshot
        if s.w_leaving[worker]:
            return float("inf")
        return float(max(self._load[worker] / s.w_capacity[worker], self._seats[worker] / s.w_max_seqs[worker]))

    # Questions

    @property
    def full(self) -> bool:
        """True when this tick's number of moves is reached."""
        return self.snapshot.planned + len(self.moves) >= self.rules.limits.max_moves_per_tick

    def busy(self, worker: int) -> bool:
        """True when the worker takes part in the allowed number of migrations."""
        return bool(self._w_moves[worker] >= self.rules.limits.max_moves_per_worker)

    def idle(self) -> Bools:
        """Workers that may take part in another migration."""
        idle: Bools = self._w_moves < self.rules.limits.max_moves_per_worker
        return idle

    def can_take(self) -> Bools:
        """Workers that may still get a running request."""
        free: Bools = self.snapshot.w_accepts & self.idle()
        return free

    def takers(self, row: int) -> Bools:
        """Workers with room and a seat for a request that no limit forbids; not the one that it has just left."""
        s, limits = self.snapshot, self.rules.limits
        fits: Bools = s.w_accepts.copy() if s.r_waiting[row] else self.can_take()
        fits &= (self.room() >= s.r_need[row]) & (self.seats() >= 1)
        fits[s.r_worker[row]] = False
        if s.r_since_move[row] < limits.no_return_s and s.r_came_from[row] < len(fits):
            fits[s.r_came_from[row]] = False
        return fits

    def room(self) -> Floats:
        """Tokens that each worker may still be promised."""
        room: Floats = self.rules.limits.max_destination_usage * self.snapshot.w_capacity - self._promised
        return room

    def seats(self) -> Floats:
        """Free seats in the batch of each worker."""
        seats: Floats = self.snapshot.w_max_seqs - self._seats
        return seats

    def candidates(self, worker: int) -> NDArray[np.int64]:
        """Requests of a worker that may move now."""
        rows = self.snapshot.rows_of(worker)
        if self.shares[worker]:
            return rows[:0]
        return rows[self._free[rows] & self.rules.movable(self.snapshot, rows)]

    def load_of(self, rows: NDArray[np.int64]) -> Floats:
        """Tokens that leave the source with each request."""
        s = self.snapshot
        load: Floats = np.where(s.r_waiting[rows], s.r_need[rows], s.r_kv[rows])
        return load

    def usage_without(self, worker: int, rows: NDArray[np.int64]) -> Floats:
        """Usage of a worker after each single request leaves."""
        s = self.snapshot
        load = (self._load[worker] - self.load_of(rows)) / s.w_capacity[worker]
        usage: Floats = np.maximum(load, (self._seats[worker] - 1) / s.w_max_seqs[worker])
        return usage

    def usage_with(self, worker: int, rows: NDArray[np.int64]) -> Floats:
        """Usage of a worker after each single request arrives."""
        s = self.snapshot
        load = (self._load[worker] + s.r_need[rows]) / s.w_capacity[worker]
        usage: Floats = np.maximum(load, (self._seats[worker] + 1) / s.w_max_seqs[worker])
        return usage

    def fits(self, worker: int, rows: NDArray[np.int64]) -> Bools:
        """Mask of single requests that the worker could take: there is room, and they have not just left it."""
        s, limits = self.snapshot, self.rules.limits
        room = limits.max_destination_usage * s.w_capacity[worker] - self._promised[worker]
        back = (s.r_came_from[rows] == worker) & (s.r_since_move[rows] < limits.no_return_s)
        ok: Bools = (s.r_need[rows] <= room) & ~back
        return ok & bool(self._seats[worker] + 1 <= s.w_max_seqs[worker])

    def pair_is_free(self, src: int, dst: int, copies: bool = True) -> bool:
        """True when another request may go from one to the other, with or without KV."""
        few = not copies or self._pairs[src, dst] < self.rules.limits.max_moves_per_pair
        return few and (dst, src) not in self._pairs

    def why_not(self, row: int, dst: int) -> HoldReason | None:
        """The first rule that forbids a move, or None."""
        s, limits = self.snapshot, self.rules.limits
        src = int(s.r_worker[row])
        moved_lately = s.r_since_move[row] < limits.no_return_s
        if self.full:
            return HoldReason.TICK_LIMIT
        if not (s.w_fresh[src] and s.w_fresh[dst]):
            return HoldReason.STALE
        if not self._free[row]:
            return HoldReason.ALREADY_MOVING if s.r_free[row] else HoldReason.NOT_MIGRATABLE
        if not (s.r_running[row] or s.r_waiting[row]):
            return HoldReason.NO_CANDIDATE
        if moved_lately and s.r_since_move[row] < limits.cooldown_s:
            return HoldReason.COOLDOWN
        if moved_lately and s.r_came_from[row] == dst:
            return HoldReason.NO_RETURN
        if self.shares[src]:
            return HoldReason.SHARED
        if src == dst or s.w_leaving[dst]:
            return HoldReason.NO_DESTINATION
        copies = not s.r_waiting[row]
        if copies and (self.busy(src) or self.busy(dst)):
            return HoldReason.WORKER_LIMIT
        if (dst, src) in self._pairs:
            return HoldReason.OPPOSITE
        if copies and self._pairs[src, dst] >= limits.max_moves_per_pair:
            return HoldReason.PAIR_LIMIT
        full = self._promised[dst] + s.r_need[row] > limits.max_destination_usage * s.w_capacity[dst]
        if full or self._seats[dst] + 1 > s.w_max_seqs[dst]:
            return HoldReason.NO_DESTINATION
        return None

    # Commands

    def move(self, row: int, dst: int, reason: str, gain_s: float) -> bool:
        """Accept a move when every rule allows it; otherwise note the reason."""
        s = self.snapshot
        src = int(s.r_worker[row])
        why = self.why_not(row, dst)
        if why is not None:
            self.hold(why, src, row)
            return False
        need = float(s.r_need[row])
        load = need if s.r_waiting[row] else float(s.r_kv[row])
        self._load[src] -= load
        self._load[dst] += need
        self._promised[dst] += need
        self._seats[src] -= 1
        self._seats[dst] += 1
        copies = int(not s.r_waiting[row])
        self._w_moves[src] += copies
        self._w_moves[dst] += copies
        self._pairs[src, dst] += copies  # The key exists also when nothing is copied: see ``Snapshot.pairs``.
        self._free[row] = False
        self.usage[src], self.usage[dst] = self._usage_of(src), self._usage_of(dst)
        self.moves.append(
            Move(
                request_id=s.request_ids[row],
                src=s.worker_ids[src],
                dst=s.worker_ids[dst],
                policy=self.policy,
                reason=reason,
                gain_s=gain_s,
                cost_s=0.0 if s.r_waiting[row] else float(self.rules.cost_s(s, np.array([row]))[0]),
                # A waiting request has no KV to copy: its move only sends its tokens.
                mode=Mode.REPLAY if s.r_waiting[row] else Mode.LIVE,
                tokens=int(need),
                row=row,
            )
        )
        return True

    def hold(self, reason: HoldReason, worker: int | None = None, row: int | None = None, detail: str = "") -> None:
        """Note the reason why something stays."""
        self.holds.append(
            Hold(
                self.policy,
                reason,
                "" if worker is None else self.snapshot.worker_ids[worker],
                "" if row is None else self.snapshot.request_ids[row],
                detail,
            )
        )

    def close(self, retire: tuple[str, ...] = (), release: tuple[str, ...] = ()) -> Plan:
        """The plan."""
        return Plan(tuple(self.moves), tuple(self.holds), retire, release)
