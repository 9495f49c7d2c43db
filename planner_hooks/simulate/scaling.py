# SPDX-License-Identifier: Apache-2.0
"""The simulated planner: how many workers there should be. It decides; ``cluster.py`` starts and retires them.

With policies its reductions pass the plugin's own ``ScaleDown``, as they do live; without any it retires a worker at
once, as Dynamo's planner does.
"""

from __future__ import annotations

import math
from collections import deque

import msgspec

from planner_hooks.simulate.worker import Worker


class Scaling(msgspec.Struct, frozen=True):
    """A planner that keeps the mean KV usage between two values, as it will be when a new worker is there."""

    low: float = 0.45
    high: float = 0.75
    interval_s: float = 5.0
    startup_s: float = 20.0
    min_workers: int = 1
    max_workers: int = 1024
    trend_s: float = 20.0
    """The growth over so long is taken to go on."""


class Change(msgspec.Struct, frozen=True):
    """One decision."""

    more: int = 0
    """Workers that are needed beside those that stay or are starting."""
    fewer: bool = False
    """One of those that stay may go."""


class Autoscaler:
    """Call ``decide`` once for each interval."""

    def __init__(self, rules: Scaling) -> None:
        self.rules = rules
        self.starting = 0
        """Workers that were started and are not there yet; the cluster counts them down."""
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
        """By how much the load has grown in each of the last seconds; never less than nothing."""
        self._loads.append((time_s, load))
        while time_s - self._loads[0][0] > self.rules.trend_s:
            self._loads.popleft()
        since, before = self._loads[0]
        return max(0.0, load - before) / max(time_s - since, self.rules.interval_s)
