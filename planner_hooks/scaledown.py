# SPDX-License-Identifier: Apache-2.0
"""Decides when there may be one decode worker fewer.

The planner decides numbers only. ``ScaleDown.decide`` is called once for each proposal and returns its bounds. A
reduction passes, one worker at a time, after it has been proposed for ``delay_s`` (in large clusters a part of that
after the first one), if the other workers can hold everything within ``max_usage`` and keep ``reserve``. Nothing passes
without a current state, while expected replicas are missing (``headcount.py``), or while an earlier number is carried
out.

This module does not choose the worker: the process that stops one (``components.serve.scale``, or the worker on
SIGTERM) drains it first, and requests without room elsewhere go on decoding there.
Not thread-safe, does no I/O, raises nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import msgspec

from planner_hooks.headcount import Headcount
from planner_hooks.plan import HoldReason
from planner_hooks.rules import ScaleDownRules
from planner_hooks.snapshot import Snapshot


class Bound(msgspec.Struct, frozen=True):
    """Answer to one proposal."""

    at_least: int
    at_most: int
    reason: HoldReason | None = None
    """Why a reduction does not pass yet."""


class ScaleDown:
    """State of one role's reduction. ``bounds`` None: a fixed number of workers."""

    def __init__(
        self,
        rules: ScaleDownRules,
        bounds: tuple[int, int] | None,
        clock: Callable[[], float] = time.monotonic,
        started: int = 0,
    ) -> None:
        self._rules = rules
        self._bounds = bounds
        self._clock = clock
        self._count = Headcount(started, clock)
        self._wanted_since: float | None = None
        self._last = -math.inf
        """Time of the last reduction."""

    def decide(self, proposed: int, ready: int, snapshot: Snapshot | None, scaling: bool = False) -> Bound:
        """Bounds for this proposal. ``scaling``: an earlier number is being carried out."""
        there = self._count.seen(ready, scaling)
        low, high = self._bounds or (there, there)
        stay = max(low, there, ready)
        if proposed >= ready or ready <= low:
            self._wanted_since = None
            reason = HoldReason.MISSING if max(proposed, ready) < there else None
        else:
            reason = self._held(there, ready, snapshot, scaling)
            if reason is None:
                self._wanted_since, self._last = None, self._clock()
                self._count.let_through(ready - 1)
                return Bound(ready - 1, ready - 1)
        return Bound(stay, max(high, stay), reason)

    def _held(self, there: int, ready: int, s: Snapshot | None, scaling: bool) -> HoldReason | None:
        """Reasons against one worker fewer now."""
        if ready < there:
            return HoldReason.MISSING
        if scaling:
            return HoldReason.SCALING
        # Leaving workers are not in Dynamo's discovery, but answer until they end.
        if s is None or not ready <= len(s.worker_ids) <= ready + int(s.w_leaving.sum()):
            return HoldReason.STALE
        now = self._clock()
        if self._wanted_since is None:
            self._wanted_since = now
        if now - self._wanted_since < self._rules.delay(ready, now - self._last):
            return HoldReason.DELAYED
        usage, left = _without_one(s)
        if usage > self._rules.allowed(left):
            self._wanted_since = None
            return HoldReason.NO_DESTINATION
        return None


def _without_one(s: Snapshot) -> tuple[float, int]:
    """Usage of the workers without the largest one, and their number.

    They must also carry the load of leaving workers, and of stale ones, which are not empty but take nothing.
    """
    capacity, seats = s.w_capacity[s.w_accepts], s.w_max_seqs[s.w_accepts]
    left = len(capacity) - 1
    if left < 1:
        return float("inf"), 0
    load = float((s.w_held + s.w_queued).sum()) / float(capacity.sum() - capacity.max())
    busy = float((s.w_running + s.w_waiting).sum()) / float(seats.sum() - seats.max())
    return max(load, busy), left
