# SPDX-License-Identifier: Apache-2.0
"""Holds a reduction of decode workers until its victims are empty, then lets it through.

The planner decides numbers only. ``ScaleDown.decide`` is asked once for each proposal and answers with the bounds that
the proposal is clamped to, and with the workers that are to be emptied or taken back:

    proposed -> delayed (the wish must last) -> victims chosen, cheapest to empty first -> draining -> let through

A reduction once begun goes on although the load of the rest rises by it; it is taken back when more workers are
proposed, or when the rest is used beyond ``give_up_usage`` or has less than half of its reserve. Nothing is let through
without a current state, or while workers that there should be are not there (``headcount.py``).
Not thread-safe, does no I/O, raises nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec
import numpy as np

from planner_hooks.headcount import Headcount
from planner_hooks.plan import HoldReason
from planner_hooks.policies.consolidate import emptying_cost
from planner_hooks.rules import ScaleDownRules
from planner_hooks.snapshot import Snapshot

_TAKEN_BACK_S = 10.0
"""A victim that does not count as leaving after this time was taken back by somebody else."""


class Bound(msgspec.Struct, frozen=True):
    """Answer to one proposal."""

    at_least: int
    at_most: int
    reason: HoldReason | None = None
    """Why a reduction does not go through yet."""
    retire: tuple[str, ...] = ()
    release: tuple[str, ...] = ()


class ScaleDown:
    """State of one role's reduction. ``bounds`` None keeps the number of workers as it is."""

    def __init__(
        self,
        rules: ScaleDownRules,
        bounds: tuple[int, int] | None,
        drain_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        started: int = 0,
    ) -> None:
        self._rules = rules
        self._bounds = bounds
        self._drain_timeout_s = drain_timeout_s
        self._clock = clock
        self._count = Headcount(started, clock)
        self._wanted_since: float | None = None
        self.victims: dict[str, float] = {}
        """Workers being emptied, and since when."""

    def decide(self, proposed: int, ready: int, snapshot: Snapshot | None, scaling: bool = False) -> Bound:
        """Bounds for this proposal. ``scaling``: an earlier number is still being carried out."""
        there = self._count.seen(ready, scaling)
        low, high = self._bounds or (there, there)
        stay = max(low, there, ready)
        if snapshot is None or len(snapshot.worker_ids) != ready:
            return Bound(stay, max(high, stay), HoldReason.STALE if proposed < there else None)
        self._forget(snapshot)
        if ready < there:
            if self._is_too_much(snapshot):
                return self._take_back(stay, high, HoldReason.NO_DESTINATION)
            return Bound(stay, max(high, stay), HoldReason.MISSING if proposed < there else None)
        if proposed > ready or ready <= low:
            return self._take_back(stay, high)
        if proposed == ready and not self.victims:
            self._wanted_since = None
            return Bound(stay, max(high, stay))
        return self._reduce(min(ready - proposed, ready - low), stay, snapshot)

    def _forget(self, s: Snapshot) -> None:
        now = self._clock()
        for worker, since in list(self.victims.items()):
            gone = worker not in s.index
            if gone or (not s.w_leaving[s.index[worker]] and now - since > _TAKEN_BACK_S):
                del self.victims[worker]

    def _take_back(self, stay: int, high: int, reason: HoldReason | None = None) -> Bound:
        release, self.victims, self._wanted_since = tuple(self.victims), {}, None
        return Bound(stay, max(high, stay), reason, release=release)

    def _reduce(self, count: int, stay: int, s: Snapshot) -> Bound:
        now = self._clock()
        if self._wanted_since is None:
            self._wanted_since = now
        if not self.victims and now - self._wanted_since < self._rules.delay_s:
            return Bound(stay, stay, HoldReason.DELAYED)
        if self._is_too_much(s):
            return self._take_back(stay, stay, HoldReason.NO_DESTINATION)
        retire: list[str] = []
        while len(self.victims) < count:
            victim = self._cheapest(s)
            if victim is None:
                break
            self.victims[victim] = now
            retire.append(victim)
        if not self.victims:
            return Bound(stay, stay, HoldReason.NO_DESTINATION)
        # A leaving worker is given nothing, so that one that is empty stays so; the rest keeps its own count.
        empty = sum(self._is_empty(s, w, now - since) for w, since in self.victims.items() if w not in retire)
        held = HoldReason.DRAINING if empty < len(self.victims) else None
        self._count.let_through(stay - empty)
        return Bound(stay - empty, stay - empty, held, tuple(retire))

    def _cheapest(self, s: Snapshot) -> str | None:
        """What is leaving already, then what is cheapest to empty; None when the rest could not hold it."""
        workers = np.array([i for i, w in enumerate(s.worker_ids) if s.w_fresh[i] and w not in self.victims], dtype=int)
        if not len(workers):
            return None
        cost = np.where(s.w_leaving[workers], -1.0, emptying_cost(s, workers))
        victim = s.worker_ids[int(workers[int(np.argmin(cost))])]
        usage, left = self._without(s, [*self.victims, victim])
        return victim if usage <= self._rules.allowed(left) else None

    def _is_too_much(self, s: Snapshot) -> bool:
        usage, left = self._without(s, list(self.victims))
        return bool(self.victims) and usage > self._rules.too_much(left)

    def _without(self, s: Snapshot, victims: list[str]) -> tuple[float, int]:
        """Usage of those that would remain, and their number."""
        stays = s.w_fresh & ~s.w_leaving
        stays[[s.index[victim] for victim in victims]] = False
        left = int(stays.sum())
        if not left:
            return float("inf"), left
        load = float((s.w_held + s.w_queued)[s.w_fresh].sum()) / float(s.w_capacity[stays].sum())
        seats = float((s.w_running + s.w_waiting)[s.w_fresh].sum()) / float(s.w_max_seqs[stays].sum())
        return max(load, seats), left

    def _is_empty(self, s: Snapshot, worker: str, leaving_s: float) -> bool:
        i = s.index[worker]
        busy = s.w_running[i] + s.w_waiting[i] + s.w_moves[i] + len(s.rows_of(i)) > 0
        return bool(s.w_fresh[i] and s.w_leaving[i] and not busy) or leaving_s > self._drain_timeout_s
