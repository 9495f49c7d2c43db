# SPDX-License-Identifier: Apache-2.0
"""An event loop in virtual time: nothing waits, the order is deterministic, a hang is an error.

``time.monotonic`` follows the loop while ``run`` runs; work for executors is done at once.
"""

from __future__ import annotations

import asyncio
import gc
import heapq
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar
from unittest import mock

T = TypeVar("T")


class Hang(AssertionError):
    """A task waits, and no event is left."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """See the module docstring."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 1000.0

    def time(self) -> float:
        """Virtual seconds."""
        return self._now

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        """Done before it returns."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def _run_once(self) -> None:
        waiting: list[Any] = self._scheduled  # type: ignore[attr-defined]
        while waiting and waiting[0]._cancelled:
            heapq.heappop(waiting)._scheduled = False
            self._timer_cancelled_count -= 1  # type: ignore[attr-defined]
        if not self._ready:  # type: ignore[attr-defined]
            if not waiting:
                raise Hang("nothing can happen any more")
            self._now = max(self._now, waiting[0]._when)
        super()._run_once()  # type: ignore[misc]


def run(main: Coroutine[Any, Any, T], unhandled: Callable[[str], None] = lambda text: None) -> T:
    """Run to the end in virtual time. ``unhandled`` gets errors of tasks and callbacks that no code has seen."""
    # Imported modules have hundreds of thousands of objects, through which every collection would go.
    gc.freeze()
    loop = VirtualLoop()
    loop.set_exception_handler(
        lambda _, told: unhandled(f"{told['message']}: {told.get('exception') or told.get('task')!r}")
    )
    with mock.patch.object(time, "monotonic", loop.time):
        asyncio.set_event_loop(loop)
        try:
            return loop.run_until_complete(main)
        finally:
            tasks = asyncio.all_tasks(loop)
            for task in tasks:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            # A task tells of an error that nobody has asked for only when it is collected.
            del tasks
            gc.collect()
            asyncio.set_event_loop(None)
            loop.close()
