# SPDX-License-Identifier: Apache-2.0
"""What two agents exchange of a block: all of it, or the KV heads that one has and the other needs.

Agents of engines with equal tensor-parallel sizes exchange whole blocks. Otherwise each pool's part of a block is
divided by heads (``heads.py``): both sides list the same pieces in the same order, from the two records alone, and join
those that touch on both sides. A head's pieces follow from its axes: the memory of a rank with one head does not show
where the axis of heads is, and must still be cut as its peer's.

Thread-safe. Raises ``IncompatibleLayout`` for pools that do not divide, or whose heads have other shapes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from components.errors import ConfigError, IncompatibleLayout
from components.transfer.config import KVPool
from components.transfer.control.record import AgentRecord, PoolRecord
from components.transfer.heads import Rank, divides, held, taken
from components.transfer.layout import Region, Segment, Span, block_bytes, locate, rows_of

_MAX_PIECES = 1 << 16
_ALONE = Rank()
Pair = tuple[Segment, Segment]
"""A piece of each target's block, and of each source's."""


@dataclass(frozen=True, eq=False)
class Share:
    """Pieces of a block on both sides, pairwise."""

    local: tuple[Segment, ...]
    remote: tuple[Segment, ...]
    rows: tuple[torch.Tensor, ...]
    """A (blocks, bytes) view of each local piece."""
    whole: bool = True
    """False for some heads only."""

    @property
    def block_bytes(self) -> int:
        """Bytes of one block that move."""
        return sum(segment.length for segment in self.local)


def divided(pools: Sequence[KVPool], regions: Sequence[Region], rank: Rank) -> tuple[PoolRecord, ...]:
    """How each pool divides into heads; empty when one of them does not, or pools overlap in part."""
    if not all(pool.heads and divides(pool.heads, rank.size) for pool in pools):
        return ()
    found = tuple(dict.fromkeys(_divided(pool, rank) for pool in pools))
    return found if sum(map(_bytes_of, found)) == block_bytes(regions) and all(map(depth_of, found)) else ()


def _divided(pool: KVPool, rank: Rank) -> PoolRecord:
    tensor, size = pool.tensor, pool.tensor.element_size()
    axes = [axis for axis in range(tensor.dim()) if axis not in (pool.block_dim, pool.head_dim)]
    count = 1 if pool.head_dim is None else tensor.shape[pool.head_dim]
    if count != len(held(pool.heads, rank)):
        raise ConfigError(
            f"pool {pool.name} has {count} KV heads; rank {rank.number} of {rank.size} holds "
            f"{len(held(pool.heads, rank))} of {pool.heads}"
        )
    return PoolRecord(
        tensor.data_ptr(),
        tensor.stride(pool.block_dim) * size,
        tuple((tensor.shape[axis], tensor.stride(axis) * size) for axis in axes) + ((size, 1),),
        pool.heads,
        0 if pool.head_dim is None else tensor.stride(pool.head_dim) * size,
        count,
    )


def _bytes_of(pool: PoolRecord) -> int:
    return pool.count * math.prod(count for count, _ in pool.axes)


def depth_of(pool: PoolRecord) -> int:
    """Number of last axes of a head that are dense in memory, without the one that counts an element's bytes."""
    size = 1
    for depth, (count, stride) in enumerate(reversed(pool.axes)):
        if count > 1 and stride != size:
            return depth - 1
        size *= count
    return len(pool.axes) - 1


def pieces_of(pool: PoolRecord, head: int, depth: int) -> Iterator[Segment]:
    """A rank's n-th head, in pieces of the last ``depth`` axes and an element's."""
    outer, inner = pool.axes[: -depth - 1], pool.axes[-depth - 1 :]
    length = math.prod(count for count, _ in inner)
    for index in itertools.product(*(range(count) for count, _ in outer)):
        offset = sum(i * stride for i, (_, stride) in zip(index, outer, strict=True))
        yield Segment(pool.address + offset + head * pool.head_stride, pool.stride, length)


class Shares:
    """What one agent exchanges with others."""

    def __init__(
        self, regions: Sequence[Region], rank: Rank = _ALONE, pools: tuple[PoolRecord, ...] = (), name: str = "here"
    ) -> None:
        self.regions = regions
        self.rank = rank
        self.pools = pools
        """How blocks divide into heads; empty: not at all."""
        self._name = name
        self._segments = tuple(segment for region in regions for segment in region.segments)
        self._flats = _storages(regions)
        self._spans = [Span(flat.data_ptr(), flat.numel()) for flat in self._flats]
        self._blocks = regions[0].rows[0].shape[0] if regions else 0
        self._known: dict[tuple[str, bool], tuple[AgentRecord, Share]] = {}

    def taken(self, peer: AgentRecord) -> Share:
        """What this agent takes of a peer's blocks."""
        return self._share(peer, takes=True)

    def given(self, peer: AgentRecord) -> Share:
        """What a peer takes of this agent's blocks."""
        return self._share(peer, takes=False)

    def _share(self, peer: AgentRecord, takes: bool) -> Share:
        known = self._known.get((peer.name, takes))
        if known is None or (known[0] is not peer and known[0] != peer):
            known = self._known[peer.name, takes] = peer, self._made(peer, takes)
        return known[1]

    def _made(self, peer: AgentRecord, takes: bool) -> Share:
        other = Rank(peer.tp_rank, peer.tp_size)
        if other.size == self.rank.size:
            remote = tuple(peer.segments())
            if [s.length for s in remote] != [s.length for s in self._segments]:
                raise IncompatibleLayout(f"agents {self._name} and {peer.name} lay their KV blocks out differently")
            return Share(self._segments, remote, tuple(rows_of(self.regions)))
        sides = (self.rank, self.pools), (other, peer.pools)
        target, source = sides if takes else reversed(sides)
        try:
            pairs = _pairs(*target, *source)
        except IncompatibleLayout as error:
            raise IncompatibleLayout(
                f"agents {self._name} and {peer.name} have ranks {self.rank.number} of {self.rank.size} and "
                f"{other.number} of {other.size}: {error}"
            ) from error
        targets, sources = zip(*pairs, strict=True)
        local, remote = (targets, sources) if takes else (sources, targets)
        return Share(local, remote, self.views(local), whole=False)

    def views(self, segments: Sequence[Segment]) -> tuple[torch.Tensor, ...]:
        """A (blocks, bytes) view of each piece of this agent's blocks."""
        return tuple(self.view(s.address, (self._blocks, s.length), (s.stride, 1)) for s in segments)

    def view(self, address: int, shape: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
        """Bytes of this agent's memory, blocks first."""
        last = Segment(address, strides[0], 1 + sum((n - 1) * s for n, s in zip(shape[1:], strides[1:], strict=True)))
        place = locate(last, self._blocks, self._spans)
        if place is None:
            raise IncompatibleLayout(f"agent {self._name} divides its blocks outside of its memory")
        return torch.as_strided(self._flats[place[0]], tuple(shape), tuple(strides), place[1])


def _storages(regions: Sequence[Region]) -> list[torch.Tensor]:
    """The memory of all regions, as bytes, in the order of addresses."""
    found = {row.untyped_storage().data_ptr(): row for row in rows_of(regions)}
    empty = [torch.empty(0, dtype=torch.uint8, device=row.device) for _, row in sorted(found.items())]
    return [flat.set_(row.untyped_storage()) for flat, (_, row) in zip(empty, sorted(found.items()), strict=True)]


def _pairs(target: Rank, filled: Sequence[PoolRecord], source: Rank, read: Sequence[PoolRecord]) -> list[Pair]:
    """The pieces that a target's rank takes from a source's."""
    if not filled or not read:
        raise IncompatibleLayout("their KV caches do not divide into heads, and move between equal sizes only")
    if [_shape(pool) for pool in filled] != [_shape(pool) for pool in read]:
        raise IncompatibleLayout("their KV heads have different shapes")
    if wrong := [p.heads for p in filled for rank in (target, source) if not divides(p.heads, rank.size)]:
        raise IncompatibleLayout(f"one of them cannot hold an equal share of {wrong[0]} KV heads")
    pairs: list[Pair] = []
    for to, origin in zip(filled, read, strict=True):
        depth = min(depth_of(to), depth_of(origin))
        to_first, from_first = held(to.heads, target).start, held(origin.heads, source).start
        for head in taken(to.heads, target, source):
            pieces = pieces_of(origin, head - from_first, depth)
            pairs += zip(pieces_of(to, head - to_first, depth), pieces, strict=True)
            if len(pairs) > _MAX_PIECES:
                raise IncompatibleLayout(f"they lay a block out in more than {_MAX_PIECES} different pieces")
    if not pairs:
        raise IncompatibleLayout("the one needs no head of the other")
    return _joined(sorted(pairs, key=lambda pair: pair[0].address))


def _shape(pool: PoolRecord) -> tuple[int, list[int]]:
    return pool.heads, [count for count, _ in pool.axes]


def _joined(pairs: Sequence[Pair]) -> list[Pair]:
    """Join pieces that follow each other on both sides."""
    joined: list[Pair] = []
    for pair in pairs:
        if joined and all(_follows(last, next_) for last, next_ in zip(joined[-1], pair, strict=True)):
            joined[-1] = _longer(joined[-1][0], pair[0]), _longer(joined[-1][1], pair[1])
        else:
            joined.append(pair)
    return joined


def _follows(last: Segment, next_: Segment) -> bool:
    touches = next_.address == last.address + last.length and next_.stride == last.stride
    return touches and last.length + next_.length <= last.stride


def _longer(one: Segment, by: Segment) -> Segment:
    return Segment(one.address, one.stride, one.length + by.length)
