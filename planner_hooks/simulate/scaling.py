# SPDX-License-Identifier: Apache-2.0
"""The simulated planner, which decides the number of workers; ``cluster.py`` starts and retires them.

With policies its reductions pass the plugin's ``ScaleDown``, as in the live system; without any it retires a worker at
once, like Dynamo's planner.
"""

from __future__ import annotations

import math
from collections import deque

import msgspec

from planner_hooks.simulate.worker import Worker


class Scaling(msgspec.Struct, frozen=True):
    """Keeps the expected mean KV usage, at the time when a new worker is ready, between two values."""

    low: float = 0.45
    high: float = 0.75
    interval_s: float = 5.0
    startup_s: float = 20.0
    min_workers: int = 1
    max_workers: int = 1024
    trend_s: float = 20.0
    """Time over which growth is measured and extrapolated."""


class Change(msgspec.Struct, frozen=True):
    """One decision."""

    more: int = 0
    """Workers to add to those that stay or are starting."""
    fewer: bool = False
    """True when one of the staying workers may leave."""


class Autoscaler:
    """Call ``decide`` once for each interval."""

    def __init__(self, rules: Scaling) -> None:
        self.rules = rules
        self.starting = 0
        """Started workers that are not ready yet; the cluster counts them down."""
        self._loads: deque[tuple[float, float]] = deque()

    def decide(self, time_s: float, workers: list[Worker], load: float) -> Change:
        """``load`` in KV capacities of one worker, queues included."""
        rules = self.rules
        stay = sum(not worker.leaving for worker in workers)
        ahead = load + self._growth(time_s, load) * (rules.startup_s + rules.interval_s)
        if ahead > rules.high * (stay + self.starting):
            return Change(more=math.ceil(ahead / rules.high) - stay - self.starting)  # At least one.
        few = load < rules.low * stay and stay > rules.min_workers and load <= rules.high * (stay - 1)
        return Change(fewer=few and not self.starting)

    def _growth(self, time_s: float, load: float) -> float:
        """Growth of the load in each of the last seconds, at least 0."""
        self._loads.append((time_s, load))
        while time_s - self._loads[0][0] > self.rules.trend_s:
            self._loads.popleft()
        since, before = self._loads[0]
        return max(0.0, load - before) / max(time_s - since, self.rules.interval_s)
