# SPDX-License-Identifier: Apache-2.0
"""KV blocks by number: their holders, the free ones, and the prefix cache of full ones.

A block without holder is free. It keeps its bytes and its place in the prefix cache until it is allocated again; the
least recently used one is allocated first.
Threading: one asyncio loop. Errors: ``NoRoom`` when too few are free, ``SessionError`` for a wrong count.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from components.errors import NoRoom, SessionError

Hash = bytes


def chain(tokens: Sequence[int], block_size: int, salt: str | None, known: Sequence[Hash] = ()) -> list[Hash]:
    """Hashes of the full blocks of ``tokens``; each covers all tokens before it. ``known``: the first hashes."""
    hashes = list(known)
    before = hashes[-1] if hashes else (salt or "").encode()
    for start in range(len(hashes) * block_size, len(tokens) - block_size + 1, block_size):
        text = b",".join(b"%d" % token for token in tokens[start : start + block_size])
        before = hashlib.blake2b(before + b"|" + text, digest_size=16).digest()
        hashes.append(before)
    return hashes


class BlockPool:
    """See the module docstring."""

    def __init__(self, num_blocks: int, caching: bool) -> None:
        self._caching = caching
        self._holders = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._hash_of: dict[int, Hash] = {}
        self._with_hash: dict[Hash, int] = {}

    @property
    def total(self) -> int:
        """Blocks of the pool."""
        return len(self._holders)

    @property
    def free(self) -> int:
        """Blocks without holder, cached ones included."""
        return len(self._free)

    def holders(self, block: int) -> int:
        """Number of the block's holders."""
        return self._holders[block]

    def allocate(self, count: int) -> list[int]:
        """Allocate ``count`` blocks, each with one holder. Raises ``NoRoom``, with none allocated."""
        if count > len(self._free):
            raise NoRoom(f"{count} KV blocks are needed, {len(self._free)} of {self.total} are free")
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._forget(block)
            self._holders[block] = 1
        return blocks

    def hold(self, blocks: Iterable[int]) -> None:
        """Add a holder to each block."""
        for block in blocks:
            self._free.pop(block, None)
            self._holders[block] += 1

    def drop(self, blocks: Iterable[int]) -> None:
        """Remove a holder from each block. Raises ``SessionError`` for a block without one."""
        freed: list[int] = []
        for block in blocks:
            if self._holders[block] == 0:
                raise SessionError(f"block {block} is given back twice")
            self._holders[block] -= 1
            if self._holders[block] == 0:
                freed.append(block)
        # The last blocks are reused first, as in vLLM: a prefix is worth more than what follows it, and checksums of
        # the last blocks then reveal that any of the request's blocks has been allocated again.
        kept = max((place for place, block in enumerate(freed, 1) if block in self._hash_of), default=0)
        for block in freed[kept:]:
            self._free[block] = None
            self._free.move_to_end(block, last=False)
        self._free.update(dict.fromkeys(reversed(freed[:kept])))

    def cached(self, hashes: Sequence[Hash]) -> list[int]:
        """Blocks of the longest cached prefix; the caller must hold those that it needs."""
        found = []
        for wanted in hashes:
            block = self._with_hash.get(wanted)
            if block is None:
                break
            found.append(block)
        return found

    def remember(self, block: int, content: Hash) -> None:
        """Enter a held block, which is full and correct, into the prefix cache."""
        if self._caching and content not in self._with_hash:
            self._forget(block)
            self._hash_of[block] = content
            self._with_hash[content] = block

    def _forget(self, block: int) -> None:
        content = self._hash_of.pop(block, None)
        if content is not None:
            del self._with_hash[content]

    def verify(self, expected: Counter[int]) -> None:
        """Raise ``SessionError`` unless every block has exactly the expected holders."""
        for block, holders in enumerate(self._holders):
            if holders != expected[block]:
                raise SessionError(f"block {block} is held {holders} times, requests account for {expected[block]}")
            if (holders == 0) != (block in self._free):
                raise SessionError(f"block {block} with {holders} holders is in the wrong list")
