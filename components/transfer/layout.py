# SPDX-License-Identifier: Apache-2.0
"""Where the bytes of a KV block lie: segments derived from the strides of the engine's cache tensors.

A block of a pool is one or more *segments*: equal, dense pieces of memory, one for each block, ``stride``
bytes apart. Any axis order works (block first, K and V planes first, heads before tokens or after, one
tensor for each layer or one for all), as long as a segment's own bytes are dense.
Pure functions over addresses; raises ``ConfigError`` for tensors that cannot be registered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from components.errors import ConfigError
from components.transfer.config import KVPool

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Segment:
    """Equal pieces of memory, one for each block, ``stride`` bytes apart."""

    address: int
    stride: int
    length: int


@dataclass(frozen=True)
class Region:
    """One registered tensor, its segments, and a (blocks, bytes) view of each."""

    name: str
    order: str
    """Axes inside a block in memory order with their lengths: equal on both sides or bytes get mixed up."""
    tensor: torch.Tensor = field(compare=False, repr=False)
    segments: tuple[Segment, ...] = ()
    rows: tuple[torch.Tensor, ...] = field(default=(), compare=False, repr=False)


def region_of(pool: KVPool) -> Region:
    """Segments of a pool. Raises ``ConfigError`` when a block's bytes have holes."""
    tensor, axis = pool.tensor, pool.block_dim
    if not 0 <= axis < tensor.dim() or tensor.shape[axis] != pool.num_blocks or pool.num_blocks < 1:
        raise ConfigError(f"pool {pool.name}: axis {axis} of shape {tuple(tensor.shape)} does not count its blocks")
    size = tensor.element_size()
    step = tensor.stride(axis)
    offsets, inner, order = [0], 1, []
    axes = [a for a in range(tensor.dim()) if a != axis and tensor.shape[a] > 1]
    for a in sorted(axes, key=lambda a: tensor.stride(a)):
        length, stride = tensor.shape[a], tensor.stride(a)
        order.append(f"{a}:{length}")
        if stride == inner and (pool.num_blocks == 1 or stride < step):
            inner *= length
        else:
            # An axis outside the dense part: each index of it is a segment of its own (K and V planes).
            offsets = [base + i * stride for base in offsets for i in range(length)]
    if len(offsets) > 4096:
        raise ConfigError(f"pool {pool.name}: blocks of strides {tensor.stride()} are in {len(offsets)} pieces")
    start = tensor.storage_offset()
    rows = tuple(
        torch.as_strided(tensor, (pool.num_blocks, inner), (step, 1), start + offset).view(torch.uint8)
        for offset in offsets
    )
    segments = tuple(Segment(tensor.data_ptr() + o * size, step * size, inner * size) for o in offsets)
    return Region(pool.name, ",".join(reversed(order)), tensor, segments, rows)


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


def extents(ours: Sequence[Segment], theirs: Sequence[Segment], our_blocks: Ints, their_blocks: Ints) -> Ints:
    """Memory of the block pairs as rows (our address, their address, bytes), merged where blocks touch."""
    merged = runs(their_blocks, our_blocks)
    parts = []
    for mine, other in zip(ours, theirs, strict=True):
        if mine.stride == mine.length and other.stride == other.length:
            far, near, counts = merged
        else:
            far, near, counts = their_blocks, our_blocks, np.ones(len(our_blocks), np.int64)
        columns = (mine.address + near * mine.stride, other.address + far * other.stride, counts * mine.length)
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
