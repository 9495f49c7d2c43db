# SPDX-License-Identifier: Apache-2.0
"""Work beside the streams of a worker: tasks that nobody waits for, and turns of freezes.

Threading: one asyncio loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

logger = logging.getLogger(__name__)
_CUT_OVERS = 32
"""Requests of this worker whose freeze is under way at a time."""


Spawn = Callable[[Coroutine[Any, Any, object]], None]


class Tasks:
    """Keeps tasks until they end."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[object]] = set()

    def spawn(self, work: Coroutine[Any, Any, object]) -> None:
        """Run something beside; its error is logged."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.warning("%s", error)


class Turn:
    """One request's turn to be frozen."""

    def __init__(self, turns: asyncio.Semaphore) -> None:
        self._turns: asyncio.Semaphore | None = turns

    def end(self) -> None:
        """Let the next request have its turn. Idempotent."""
        turns, self._turns = self._turns, None
        if turns is not None:
            turns.release()


class CutOvers:
    """Requests of this worker between their last token here and their first one elsewhere."""

    def __init__(self) -> None:
        self.count = 0
        self._turns = asyncio.Semaphore(_CUT_OVERS)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[Turn]:
        """Around a freeze, up to the first token elsewhere."""
        await self._turns.acquire()
        turn = Turn(self._turns)
        self.count += 1
        try:
            yield turn
        finally:
            self.count -= 1
            turn.end()
