# SPDX-License-Identifier: Apache-2.0
"""Reads a life's stream during a move, and stops when the life has left.

Otherwise the handler, and with it the client, would wait until the engine has ended the stream, which takes the rest
of a step and a message from the engine's process.

Threading: one asyncio loop. Life cycle: ``items`` once, then ``close``, which ends a waiting read.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Generic, TypeVar

from components.migration.legs import Leg

T = TypeVar("T")
_CLOSE_S = 5.0


class _Ended(Exception):
    """The stream has no more items."""


class Parting(Generic[T]):
    """See the module docstring."""

    def __init__(self, leg: Leg, left: asyncio.Event, stream: AsyncIterator[T]) -> None:
        self._leg = leg
        self._left = left
        self._stream = stream
        self._next: asyncio.Task[T] | None = None

    async def items(self) -> AsyncGenerator[T, None]:
        """Items of the stream, to its end or to the last token before the cut."""
        left = asyncio.create_task(self._left.wait())
        try:
            while not self._whole():
                if self._next is None:
                    self._next = asyncio.create_task(self._read())
                waited: set[asyncio.Task[Any]] = {self._next} if left.done() else {self._next, left}
                await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                if self._next.done():
                    read, self._next = self._next, None
                    try:
                        item = read.result()
                    except _Ended:
                        return
                    yield item
        finally:
            left.cancel()

    async def _read(self) -> T:
        async for item in self._stream:
            return item
        raise _Ended

    def _whole(self) -> bool:
        away = self._leg.away
        return away is not None and len(self._leg.known()) >= len(away.cut)

    async def close(self) -> None:
        """Give up the stream, unless the life has left: the engine then ends it."""
        if self._next is None:
            return
        if self._leg.away is not None:
            await asyncio.wait({self._next}, timeout=_CLOSE_S)
        self._next.cancel()
        await asyncio.gather(self._next, return_exceptions=True)
