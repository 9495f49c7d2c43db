# SPDX-License-Identifier: Apache-2.0
"""How many workers of a role there should be, which is more than the planner sees while some of them start.

A worker that is starting, or is started again after a crash, is not seen. A number made of those that are seen would,
once carried out, stop the others. So what is missing counts as there, until it has been missing for ``GONE_S``: then
somebody else has taken it away. Not thread-safe, does no I/O, raises nothing.
"""

from __future__ import annotations

from collections.abc import Callable

GONE_S = 600.0


class Headcount:
    """Begins with the workers that were started; 0 when that is not known."""

    def __init__(self, started: int, clock: Callable[[], float]) -> None:
        self._count = started
        self._clock = clock
        self._missing_since: float | None = None

    def seen(self, ready: int, scaling: bool) -> int:
        """Workers that there should be. ``scaling``: a number that was decided is still being carried out."""
        now = self._clock()
        if ready >= self._count:
            self._missing_since = None
            if not scaling:
                self._count = ready
        elif self._missing_since is None:
            self._missing_since = now
        elif now - self._missing_since > GONE_S:
            self._count, self._missing_since = ready, None
        return self._count

    def let_through(self, count: int) -> None:
        """The planner may have so few from now on."""
        self._count = min(self._count, count)
