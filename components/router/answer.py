# SPDX-License-Identifier: Apache-2.0
"""The chunks of one response, for Dynamo to iterate over.

Dynamo's bindings call ``__anext__`` for each chunk and hand what they get to ``asyncio.ensure_future``, which makes a
task of anything but a future. Here it is a future that was made before it is asked for, so that a token wakes no task
and resumes no generator. Life cycle: ``put`` any number of chunks, then ``end``; what is put later is ignored.
Threading: ``__anext__`` on any thread, one call at a time; all else on the loop's.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any


class Answer:
    """See the module docstring."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._ended = False
        self._next: asyncio.Future[dict[str, Any]] = loop.create_future()
        self._futures = deque([self._next])

    def __aiter__(self) -> Answer:
        return self

    def __anext__(self) -> asyncio.Future[dict[str, Any]]:
        try:
            return self._futures.popleft()
        except IndexError:
            raise StopAsyncIteration from None

    def put(self, chunk: dict[str, Any]) -> None:
        """Another chunk."""
        if self._ended:
            return
        known, self._next = self._next, self._loop.create_future()
        # Before the reader hears of this one: it asks for the next at once.
        self._futures.append(self._next)
        if not known.done():  # A reader that was cancelled has cancelled it.
            known.set_result(chunk)

    def end(self, error: Exception | None = None) -> None:
        """No more chunks, or an error in their place."""
        if self._ended:
            return
        self._ended = True
        if not self._next.done():
            self._next.set_exception(error or StopAsyncIteration())
            self._next.exception()  # Nobody may be left to be told.
