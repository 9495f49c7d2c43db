# SPDX-License-Identifier: Apache-2.0
"""Simulated time: calls in the order of their times, those of one time in the order in which they were made."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable


class Events:
    """The clock of one run, and what is still to happen."""

    def __init__(self) -> None:
        self.time_s = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()

    def at(self, time_s: float, call: Callable[[], None]) -> None:
        """Call at a time."""
        heapq.heappush(self._due, (time_s, next(self._count), call))

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Call some seconds from now."""
        self.at(self.time_s + seconds, call)

    def run(self, end_s: float, more: Callable[[], bool]) -> None:
        """Go on until nothing is left, nothing more is wanted, or an event is later than the end."""
        while self._due and more():
            self.time_s, _, call = heapq.heappop(self._due)
            if self.time_s > end_s:
                break
            call()
