# SPDX-License-Identifier: Apache-2.0
"""Where the bytes of KV blocks lie, and how lists of blocks become memory to copy.

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

from components.errors import TransferError

Ints = npt.NDArray[np.int64]
_PIECES_AT_ONCE = 4


@dataclass(frozen=True)
class Segment:
    """Equal pieces of memory, one for each block, ``stride`` bytes apart.

    A block may be cut into ``parts`` of ``length`` bytes that lie ``gap`` bytes apart; the index then counts parts.
    """

    address: int
    stride: int
    length: int
    parts: int = 1
    gap: int = 0

    def at(self, index: Ints) -> Ints:
        """Addresses of blocks, or of parts of blocks."""
        if self.parts == 1:
            return self.address + index * self.stride
        return self.address + (index // self.parts) * self.stride + (index % self.parts) * self.gap

    def span(self, blocks: int) -> int:
        """Bytes from where the first block begins to where the last one ends."""
        return (blocks - 1) * self.stride + (self.parts - 1) * self.gap + self.length

    @property
    def dense(self) -> bool:
        """True when neighbours in number are neighbours in memory."""
        return self.stride == self.parts * self.length and (self.parts == 1 or self.gap == self.length)


@dataclass(frozen=True)
class Span:
    """A piece of memory."""

    address: int
    size: int


@dataclass(frozen=True)
class Region:
    """Registered memory of one pool, or of several that lie over or beside each other."""

    name: str
    order: str
    """How bytes lie inside a block: equal on both sides or they get mixed up."""
    device: torch.device
    token_bytes: int = 0
    """Bytes of a token inside a segment, where tokens follow each other densely; 0 when that is not so."""
    segments: tuple[Segment, ...] = ()
    rows: tuple[torch.Tensor, ...] = field(default=(), compare=False, repr=False)
    """A (blocks, bytes) view of each segment."""


def locate(segment: Segment, blocks: int, spans: Sequence[Span]) -> tuple[int, int] | None:
    """Which of the spans, in the order of their addresses, holds all blocks of a segment, and how far into it."""
    at = bisect_right(spans, segment.address, key=lambda span: span.address) - 1
    if at < 0 or min(segment.stride, segment.gap, segment.length) < 0:
        return None
    offset = segment.address - spans[at].address
    return (at, offset) if offset + segment.span(blocks) <= spans[at].size else None


def cut(segment: Segment, token_bytes: int, block_size: int, unit: int) -> list[Segment]:
    """The segment's blocks cut into parts of ``unit`` tokens, one segment for each run of tokens inside a block."""
    length = unit * token_bytes
    return [
        Segment(segment.address + start, segment.stride, length, block_size // unit, length)
        for start in range(0, segment.length, block_size * token_bytes)
    ]


def rows_of(regions: Sequence[Region], block_size: int, unit: int) -> list[torch.Tensor]:
    """Views (blocks, bytes) of all segments; with a ``unit`` of tokens (blocks, parts, bytes)."""
    if not unit:
        return [row for region in regions for row in region.rows]
    views = []
    for region in regions:
        for row in region.rows:
            length = unit * region.token_bytes
            shape = (row.shape[0], block_size // unit, length)
            for start in range(0, row.shape[1], block_size * region.token_bytes):
                at = row.storage_offset() + start
                views.append(torch.as_strided(row, shape, (row.stride(0), length, 1), at))
    return views


def take(row: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Blocks or parts of a view as (count, bytes)."""
    if row.dim() == 2:
        return row.index_select(0, index)
    return row[index // row.shape[1], index % row.shape[1]]


def put(row: torch.Tensor, index: torch.Tensor, data: torch.Tensor) -> None:
    """Reverse of ``take``."""
    if row.dim() == 2:
        row.index_copy_(0, index, data)
    else:
        row[index // row.shape[1], index % row.shape[1]] = data


def pair_up(ours: Ints, our_size: int, theirs: Ints, their_size: int) -> tuple[Ints, Ints, int]:
    """Block lists as pairs, and their unit in tokens: 0 for whole blocks of equal size.

    Of unequal sizes one is a multiple of the other: the longer blocks are cut, and the last one may be covered in
    part. Raises ``TransferError`` for lists that do not fit.
    """
    if our_size == their_size:
        if len(ours) != len(theirs):
            raise TransferError(f"{len(ours)} blocks of ours for {len(theirs)} of the peer")
        return ours, theirs, 0
    unit, parts = min(our_size, their_size), max(our_size, their_size) // min(our_size, their_size)
    long, short = (ours, theirs) if our_size > their_size else (theirs, ours)
    if -(-len(short) // parts) != len(long):
        raise TransferError(f"{len(short)} blocks of {unit} tokens do not fit {len(long)} of {parts * unit}")
    whole = parts_of(long, parts)[: len(short)]
    return (whole, short, unit) if our_size > their_size else (short, whole, unit)


def parts_of(blocks: Ints, parts: int) -> Ints:
    """Numbers of all parts of blocks, in order."""
    return (blocks[:, None] * parts + np.arange(parts)).reshape(-1)


def block_bytes(regions: Sequence[Region]) -> int:
    """Bytes of one block over all regions."""
    return sum(segment.length for region in regions for segment in region.segments)


def runs(src: Ints, dst: Ints) -> tuple[Ints, Ints, Ints]:
    """Merge neighbouring pairs: first source blocks, first destination blocks, counts."""
    if not len(src):
        empty = np.empty(0, np.int64)
        return empty, empty, empty
    first = np.flatnonzero(np.r_[True, (np.diff(src) != 1) | (np.diff(dst) != 1)])
    return src[first], dst[first], np.diff(np.r_[first, len(src)])


def groups_of(count: int, size: int) -> list[tuple[int, int]]:
    """(first, past the last) of groups of ``size``; the last may be smaller."""
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def is_one_run(blocks: Ints) -> bool:
    """True for neighbours in ascending order."""
    count = len(blocks)
    if not count or int(blocks[-1] - blocks[0]) != count - 1:
        return False
    return int(np.count_nonzero(blocks[1:] > blocks[:-1])) == count - 1


def extents(ours: Sequence[Segment], theirs: Sequence[Segment], our_blocks: Ints, their_blocks: Ints) -> Ints:
    """Memory of the block pairs as rows (our address, their address, bytes), merged where blocks touch."""
    merged = runs(their_blocks, our_blocks)
    parts = []
    for mine, other in zip(ours, theirs, strict=True):
        if mine.dense and other.dense:
            far, near, counts = merged
        else:
            far, near, counts = their_blocks, our_blocks, np.ones(len(our_blocks), np.int64)
        columns = (mine.at(near), other.at(far), counts * mine.length)
        parts.append(np.stack(columns, axis=1))
    return np.concatenate(parts) if parts else np.empty((0, 3), np.int64)


def pieces(memory: Ints, limit: int) -> list[Ints]:
    """Cut extents into groups of about ``limit`` bytes; extents longer than that are cut themselves."""
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
    ours: Sequence[Segment], theirs: Sequence[Segment], our_blocks: Ints, their_blocks: Ints, limit: int
) -> Iterator[Ints]:
    """``pieces`` of ``extents``, some at a time: the first are copied while the next are worked out."""
    first, size = 0, 0
    for past, segment in enumerate(ours, 1):
        size += len(our_blocks) * segment.length
        if size >= _PIECES_AT_ONCE * limit or past == len(ours):
            yield from pieces(extents(ours[first:past], theirs[first:past], our_blocks, their_blocks), limit)
            first, size = past, 0
