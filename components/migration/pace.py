# SPDX-License-Identifier: Apache-2.0
"""How much KV leaves a worker at a time: as much as its lanes carry in a few seconds.

A drain begins all moves at once. Without a bound, copies of many long requests over a slow network would all take
longer than the time-out of each. The rate is that of the copies under way or of the last ones; until some have ended
``_FIRST_BYTES`` go at a time. A request with more than the bound goes alone.

Threading: one asyncio loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

_FIRST_BYTES = 8 << 30
_SECONDS = 5.0


class Pace:
    """See the module docstring."""

    def __init__(self) -> None:
        self._under_way = 0
        self._landed = 0
        self._since = 0.0
        self._rate = 0.0
        self._changed = asyncio.Event()

    @property
    def bound(self) -> float:
        """Bytes that may be under way."""
        return max(_FIRST_BYTES, _SECONDS * self._rate)

    @asynccontextmanager
    async def room(self, size: int) -> AsyncIterator[None]:
        """Around the copying of ``size`` bytes, which begins when there is room."""
        while self._under_way and self._under_way + size > self.bound:
            await self._changed.wait()
        if not self._under_way:
            self._since, self._landed = time.monotonic(), 0
        self._under_way += size
        try:
            yield
            self._landed += size
            self._rate = self._landed / max(1e-3, time.monotonic() - self._since)
        finally:
            self._under_way -= size
            self._changed.set()
            self._changed = asyncio.Event()
