# SPDX-License-Identifier: Apache-2.0
"""KV blocks by number: their holders, and the free ones.

A block without holder is free, and keeps its bytes until it is allocated again. A request's last blocks are allocated
first, as in vLLM: checksums of the last blocks reveal that any of the request's blocks has another owner.
Threading: one asyncio loop. Errors: ``NoRoom`` when too few are free, ``SessionError`` for a wrong count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from components.errors import NoRoom, SessionError


class BlockPool:
    """See the module docstring."""

    def __init__(self, num_blocks: int) -> None:
        self._holders = [0] * num_blocks
        self._free = list(range(num_blocks))
        """The next one to allocate is the last."""

    @property
    def total(self) -> int:
        """Blocks of the pool."""
        return len(self._holders)

    @property
    def free(self) -> int:
        """Blocks without holder."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Allocate ``count`` blocks, each with one holder. Raises ``NoRoom``, with none allocated."""
        if count > len(self._free):
            raise NoRoom(f"{count} KV blocks are needed, {len(self._free)} of {self.total} are free")
        blocks = [self._free.pop() for _ in range(count)]
        self.hold(blocks)
        return blocks

    def hold(self, blocks: Iterable[int]) -> None:
        """Add a holder to each allocated block."""
        for block in blocks:
            self._holders[block] += 1

    def drop(self, blocks: Iterable[int]) -> None:
        """Remove a holder from each block. Raises ``SessionError`` for a block without one."""
        for block in blocks:
            if self._holders[block] == 0:
                raise SessionError(f"block {block} is given back twice")
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free.append(block)

    def verify(self, expected: Counter[int]) -> None:
        """Raise ``SessionError`` unless every block has exactly the expected holders."""
        free = set(self._free)
        for block, holders in enumerate(self._holders):
            if holders != expected[block]:
                raise SessionError(f"block {block} is held {holders} times, requests account for {expected[block]}")
            if (holders == 0) != (block in free):
                raise SessionError(f"block {block} with {holders} holders is in the wrong list")
