# SPDX-License-Identifier: Apache-2.0
"""KV pools as memory: the storages to register, and the segments in them that hold a block.

Pools are views: of a tensor each, or all of one storage, with axes in any order. Memory that several pools share
(layers with the same KV, overlaid cache groups) is listed once, and pieces of a block that touch are joined: with
the blocks outermost, a block of all layers is a single piece. A block number means the same block in every pool.
Pure functions over addresses; raises ``ConfigError`` for pools in which two block numbers share bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from components.errors import ConfigError
from components.transfer.config import KVPool
from components.transfer.layout import Region, Segment, Span

_MAX_PIECES = 4096


@dataclass(frozen=True)
class _Piece:
    """One piece of a block in a pool: its place in block 0, and the distance to the next block's."""

    pool: int
    number: int
    storage: int
    start: int
    length: int
    stride: int


@dataclass(frozen=True)
class _Pieces:
    """A pool's pieces, and what must be equal at a peer for the bytes to have the same meaning."""

    order: str
    pieces: tuple[_Piece, ...]


@dataclass
class _Run:
    """Pieces that touch or overlap, as one."""

    storage: int
    start: int
    end: int
    stride: int
    pieces: list[_Piece] = field(default_factory=list)

    def span(self, blocks: int) -> int:
        """Bytes from the begin of its first block to the end of the last one."""
        return (blocks - 1) * self.stride + self.end - self.start


def storages_of(pools: Sequence[KVPool]) -> tuple[Span, ...]:
    """The storages that pools are views of, each once, in the order of their first pools."""
    return tuple(dict.fromkeys(_storage(pool.tensor) for pool in pools))


def _storage(tensor: torch.Tensor) -> Span:
    storage = tensor.untyped_storage()
    return Span(storage.data_ptr(), storage.nbytes())


def regions_of(pools: Sequence[KVPool]) -> list[Region]:
    """One region for each pool, or for pools whose bytes overlap or touch."""
    if len({(pool.tensor.device, pool.num_blocks) for pool in pools}) > 1:
        raise ConfigError("all KV pools of an agent must be on one device and have equally many blocks")
    storages = storages_of(pools)
    laid = [_pieces(pool, number, storages.index(_storage(pool.tensor))) for number, pool in enumerate(pools)]
    runs = _runs(sorted((p for each in laid for p in each.pieces), key=lambda p: (p.storage, p.stride, p.start)))
    _require_apart(pools, runs)
    first = list(range(len(pools)))
    for run in runs:
        joined = {first[piece.pool] for piece in run.pieces}
        first = [min(joined) if each in joined else each for each in first]
    regions = []
    for lowest in sorted(set(first)):
        members = [number for number, each in enumerate(first) if each == lowest]
        regions.append(_region(pools, laid, members, [run for run in runs if first[run.pieces[0].pool] == lowest]))
    return regions


def _pieces(pool: KVPool, number: int, storage: int) -> _Pieces:
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
            # Each index of an axis outside the dense part is a piece of its own (K and V planes).
            offsets = [base + i * stride for i in range(length) for base in offsets]
    if len(offsets) > _MAX_PIECES:
        raise ConfigError(f"pool {pool.name}: blocks of strides {tensor.stride()} are in {len(offsets)} pieces")
    begin = int(tensor.storage_offset()) * size
    pieces = (
        _Piece(number, nth, storage, begin + o * size, inner * size, step * size) for nth, o in enumerate(offsets)
    )
    return _Pieces(",".join(reversed(order)), tuple(pieces))


def _runs(pieces: Sequence[_Piece]) -> list[_Run]:
    """Pieces in the order of their addresses, joined where they touch within a block."""
    runs: list[_Run] = []
    for piece in pieces:
        end = piece.start + piece.length
        last = runs[-1] if runs else None
        if (
            last is not None
            and (last.storage, last.stride) == (piece.storage, piece.stride)
            and piece.start <= last.end
            and max(end, last.end) - last.start <= piece.stride
        ):
            last.end = max(end, last.end)
        else:
            last = _Run(piece.storage, piece.start, end, piece.stride)
            runs.append(last)
        last.pieces.append(piece)
    return runs


def _require_apart(pools: Sequence[KVPool], runs: Sequence[_Run]) -> None:
    """Raise ``ConfigError`` when a byte belongs to two block numbers."""
    ordered = sorted(runs, key=lambda run: (run.storage, run.start))
    blocks = pools[0].num_blocks if pools else 0
    for at, run in enumerate(ordered):
        length, pool = run.end - run.start, pools[run.pieces[0].pool]
        if blocks > 1 and run.stride < length:
            raise _shared(pool, pool)
        for other in ordered[at + 1 :]:
            if other.storage != run.storage or other.start >= run.start + run.span(blocks):
                break
            shift = (other.start - run.start) % max(1, run.stride)
            apart = shift >= length and shift + other.end - other.start <= run.stride
            if other.stride != run.stride or not apart:
                raise _shared(pool, pools[other.pieces[0].pool])


def _shared(one: KVPool, other: KVPool) -> ConfigError:
    return ConfigError(
        f"pools {one.name} (shape {tuple(one.tensor.shape)}, strides {one.tensor.stride()}) and {other.name} (shape "
        f"{tuple(other.tensor.shape)}, strides {other.tensor.stride()}) keep different blocks in the same bytes"
    )


def _region(pools: Sequence[KVPool], laid: Sequence[_Pieces], members: Sequence[int], runs: Sequence[_Run]) -> Region:
    pool = pools[members[0]]
    storage = pool.tensor.untyped_storage()
    flat = torch.empty(0, dtype=torch.uint8, device=pool.tensor.device).set_(storage)
    name, order = pool.name, laid[members[0]].order
    if any(len(run.pieces) > 1 for run in runs):
        name = f"{name} and {len(members) - 1} more"
        order = _order_of(pools, laid, runs)
    segments = tuple(
        Segment(storage.data_ptr() + run.start, run.stride, run.end - run.start)
        for run in sorted(runs, key=lambda run: run.start)
    )
    rows = tuple(
        torch.as_strided(flat, (pool.num_blocks, s.length), (s.stride, 1), s.address - storage.data_ptr())
        for s in segments
    )
    return Region(name, order, pool.tensor.device, segments, rows)


def _order_of(pools: Sequence[KVPool], laid: Sequence[_Pieces], runs: Sequence[_Run]) -> str:
    """Digest of the place of every pool's pieces in a block."""
    found = [
        (pools[p.pool].name, laid[p.pool].order, p.number, p.start - run.start, p.length)
        for run in sorted(runs, key=lambda run: run.start)
        for p in run.pieces
    ]
    return "joined:" + hashlib.sha256(repr(found).encode()).hexdigest()
