# SPDX-License-Identifier: Apache-2.0
"""How many migrations of one router run at once, for each worker and for each pair of workers.

Who comes first waits first for its pair; a wait ends, because every migration has deadlines. One asyncio loop.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class MoveLimits:
    """Workers are named by their instance ids; both ends of a migration take part in it."""

    def __init__(self, per_worker: int, per_pair: int) -> None:
        self._per_worker = per_worker
        self._per_pair = per_pair
        self._workers: Counter[int] = Counter()
        self._pairs: Counter[frozenset[int]] = Counter()
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def slot(self, source: int, target: int) -> AsyncIterator[None]:
        """Wait until one more migration fits, and count it for the time of the block."""
        pair = frozenset((source, target))
        async with self._changed:
            await self._changed.wait_for(lambda: self._fits(pair))
            self._workers.update(pair)
            self._pairs[pair] += 1
        try:
            yield
        finally:
            self._workers.subtract(pair)
            self._pairs[pair] -= 1
            self._workers, self._pairs = +self._workers, +self._pairs
            async with self._changed:
                self._changed.notify_all()

    def _fits(self, pair: frozenset[int]) -> bool:
        return self._pairs[pair] < self._per_pair and all(self._workers[w] < self._per_worker for w in pair)
