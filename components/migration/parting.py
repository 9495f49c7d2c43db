# SPDX-License-Identifier: Apache-2.0
"""Reads a life's stream during a move, and stops when the life has left.

Otherwise the handler, and with it the client, would wait until the engine has ended the stream, which takes the rest
of a step and a message from the engine's process.

Threading: one asyncio loop. Life cycle: ``items`` once, then ``close``, which ends a waiting read.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Generic, TypeVar

from components.migration.legs import Leg

T = TypeVar("T")
_CLOSE_S = 5.0


class _Ended(Exception):
    """The stream has no more items."""


class Parting(Generic[T]):
    """See the module docstring."""

    def __init__(self, leg: Leg, stream: AsyncIterator[T]) -> None:
        self._leg = leg
        self._stream = stream
        self._next: asyncio.Task[T] | None = None

    async def items(self) -> AsyncGenerator[T, None]:
        """Items of the stream, to its end or to the last token before the cut."""
        while not self._whole():
            if self._next is None:
                self._next = asyncio.create_task(self._read())
            await self._change(self._next)
            if self._next.done():
                read, self._next = self._next, None
                try:
                    item = read.result()
                except _Ended:
                    return
                yield item

    async def _change(self, read: asyncio.Task[T]) -> None:
        """Until the item is there or the life leaves. One future: with many streams each turn of the loop counts."""
        changed = asyncio.get_running_loop().create_future()

        def wake(_: object = None) -> None:
            if not changed.done():
                changed.set_result(None)

        read.add_done_callback(wake)
        self._leg.parted = wake
        try:
            await changed
        finally:
            self._leg.parted = None
            read.remove_done_callback(wake)

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
