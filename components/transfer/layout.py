# SPDX-License-Identifier: Apache-2.0
"""Addresses of KV blocks, and lists of blocks as memory to copy.

A block of a region is one or more *segments*: equal, dense pieces of memory, one for each block, ``stride``
bytes apart; ``regions.py`` finds them. Pure functions over addresses; lists that do not fit raise ``TransferError``.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

Ints = npt.NDArray[np.int64]
_PIECES_AT_ONCE = 4


@dataclass(frozen=True)
class Segment:
    """Equal pieces of memory, one for each block, ``stride`` bytes apart."""

    address: int
    stride: int
    length: int

    def at(self, blocks: Ints) -> Ints:
        """Addresses of blocks."""
        return self.address + blocks * self.stride

    def span(self, blocks: int) -> int:
        """Bytes from the begin of the first block to the end of the last one."""
        return (blocks - 1) * self.stride + self.length

    @property
    def dense(self) -> bool:
        """True when consecutive blocks touch in memory."""
        return self.stride == self.length


@dataclass(frozen=True)
class Span:
    """A piece of memory."""

    address: int
    size: int


@dataclass(frozen=True)
class Region:
    """Registered memory of one pool, or of several that overlap or touch."""

    name: str
    order: str
    """Order of the bytes inside a block; must be equal on both sides."""
    device: torch.device
    segments: tuple[Segment, ...] = ()
    rows: tuple[torch.Tensor, ...] = field(default=(), compare=False, repr=False)
    """A (blocks, bytes) view of each segment."""


def locate(segment: Segment, blocks: int, spans: Sequence[Span]) -> tuple[int, int] | None:
    """Index of the span, of those sorted by address, that holds all blocks of a segment, and the offset in it."""
    at = bisect_right(spans, segment.address, key=lambda span: span.address) - 1
    if at < 0 or min(segment.stride, segment.length) < 0:
        return None
    offset = segment.address - spans[at].address
    return (at, offset) if offset + segment.span(blocks) <= spans[at].size else None


def rows_of(regions: Sequence[Region]) -> list[torch.Tensor]:
    """Views (blocks, bytes) of all segments."""
    return [row for region in regions for row in region.rows]


def block_bytes(regions: Sequence[Region]) -> int:
    """Bytes of one block over all regions."""
    return sum(segment.length for region in regions for segment in region.segments)


def runs(remote: Ints, local: Ints) -> tuple[Ints, Ints, Ints]:
    """Merge neighbouring pairs: first remote blocks, first local blocks, counts."""
    if not len(remote):
        empty = np.empty(0, np.int64)
        return empty, empty, empty
    first = np.flatnonzero(np.r_[True, (np.diff(remote) != 1) | (np.diff(local) != 1)])
    return remote[first], local[first], np.diff(np.r_[first, len(remote)])


def groups_of(count: int, size: int) -> list[tuple[int, int]]:
    """(first, past the last) of groups of ``size``; the last group may be smaller."""
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def is_one_run(blocks: Ints) -> bool:
    """True for consecutive blocks in ascending order."""
    count = len(blocks)
    if not count or int(blocks[-1] - blocks[0]) != count - 1:
        return False
    return int(np.count_nonzero(blocks[1:] > blocks[:-1])) == count - 1


def extents(local: Sequence[Segment], remote: Sequence[Segment], local_blocks: Ints, remote_blocks: Ints) -> Ints:
    """Memory of the block pairs as rows (local address, remote address, bytes), merged where blocks touch."""
    merged = runs(remote_blocks, local_blocks)
    each = remote_blocks, local_blocks, np.ones(len(local_blocks), np.int64)
    parts = []
    for to, origin in zip(local, remote, strict=True):
        sources, targets, counts = merged if to.dense and origin.dense else each
        parts.append(np.stack((to.at(targets), origin.at(sources), counts * to.length), axis=1))
    return np.concatenate(parts) if parts else np.empty((0, 3), np.int64)


def pieces(memory: Ints, limit: int) -> list[Ints]:
    """Divide extents into groups of about ``limit`` bytes; longer extents are cut."""
    if not len(memory):
        return []
    counts = -(-memory[:, 2] // limit)
    if counts.max() > 1:
        owner = np.repeat(np.arange(len(memory)), counts)
        nth = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        cut = memory[owner].copy()
        cut[:, :2] += (nth * limit)[:, None]
        cut[:, 2] = np.minimum(limit, memory[owner, 2] - nth * limit)
        memory = cut
    ends = np.cumsum(memory[:, 2])
    group = (ends - 1) // limit
    return np.split(memory, np.flatnonzero(np.diff(group)) + 1)


def batches(
    local: Sequence[Segment], remote: Sequence[Segment], local_blocks: Ints, remote_blocks: Ints, limit: int
) -> Iterator[Ints]:
    """``pieces`` of ``extents``, in batches: the first are copied while the next are computed."""
    first, size = 0, 0
    for past, segment in enumerate(local, 1):
        size += len(local_blocks) * segment.length
        if size >= _PIECES_AT_ONCE * limit or past == len(local):
            yield from pieces(extents(local[first:past], remote[first:past], local_blocks, remote_blocks), limit)
            first, size = past, 0
