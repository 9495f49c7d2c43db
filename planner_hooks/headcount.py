# SPDX-License-Identifier: Apache-2.0
"""Expected replicas per role, which exceed the ready count while workers start.

The planner does not see a worker that starts, also after a crash. A number from the visible workers would stop the
others when carried out. So a missing worker counts as existing until it has been missing for ``GONE_S``: then it was
taken away. Not thread-safe, does no I/O, raises nothing.
"""

from __future__ import annotations

from collections.abc import Callable

GONE_S = 600.0


class Headcount:
    """Begins with the number of started workers; 0: unknown."""

    def __init__(self, started: int, clock: Callable[[], float]) -> None:
        self._count = started
        self._clock = clock
        self._missing_since: float | None = None

    def seen(self, ready: int, scaling: bool) -> int:
        """Expected replicas. ``scaling``: a decided number is being carried out."""
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
        """Lower the expectation."""
        self._count = min(self._count, count)
