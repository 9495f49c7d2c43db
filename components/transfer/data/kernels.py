# SPDX-License-Identifier: Apache-2.0
"""Gather and scatter of KV blocks: one Triton kernel on CUDA, torch's index copies elsewhere.

A copier is called as ``copier(blocks, buffer, gather)`` and moves the blocks of all segments between the pools
and ``buffer``, where segment follows segment. On CUDA it queues work on the current stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Copier = Callable[[torch.Tensor, torch.Tensor, bool], None]
Mover = Callable[[torch.Tensor, torch.Tensor], None]
_WORD = 8
_TILE_WORDS = 2048


def copier(rows: Sequence[torch.Tensor]) -> Copier:
    """The fastest copier for these (blocks, bytes) views."""
    lengths = {row.shape[1] for row in rows}
    aligned = all(row.data_ptr() % 16 == 0 and row.stride(0) % 16 == 0 for row in rows)
    if rows[0].is_cuda and len(lengths) == 1 and aligned and next(iter(lengths)) % 16 == 0:
        try:
            return _triton_copier(rows)
        except ImportError:
            pass
    return _torch_copier(rows)


_movers: dict[tuple[int, ...], Mover | None] = {}
"""Kernels are compiled once for a pair of agents, not once for a transfer."""


def mover(source: Sequence[torch.Tensor], target: Sequence[torch.Tensor]) -> Mover | None:
    """One kernel that copies blocks of one set of CUDA pools straight into those of another.

    Called with (source blocks, target blocks), both int64 on the device. None where it cannot be had.
    """
    key = tuple(row.data_ptr() for row in (*source, *target))
    if key not in _movers:
        _movers[key] = _new_mover(source, target)
    return _movers[key]


def _new_mover(source: Sequence[torch.Tensor], target: Sequence[torch.Tensor]) -> Mover | None:
    rows = [*source, *target]
    lengths = {row.shape[1] for row in rows}
    aligned = all(row.data_ptr() % 16 == 0 and row.stride(0) % 16 == 0 for row in rows)
    if not (all(row.is_cuda for row in rows) and len(lengths) == 1 and aligned and next(iter(lengths)) % 16 == 0):
        return None
    try:
        return _triton_mover(source, target)
    except ImportError:
        return None


def _torch_copier(rows: Sequence[torch.Tensor]) -> Copier:
    # Wider words make index_select several times faster than single bytes.
    wide = [_widen(row) for row in rows]

    def run(blocks: torch.Tensor, buffer: torch.Tensor, gather: bool) -> None:
        start = 0
        for row in wide:
            size = row.shape[1] * row.element_size() * len(blocks)
            part = buffer[start : start + size].view(row.dtype).view(len(blocks), row.shape[1])
            if gather:
                torch.index_select(row, 0, blocks, out=part)
            else:
                row.index_copy_(0, blocks, part)
            start += size

    return run


def _widen(row: torch.Tensor) -> torch.Tensor:
    for dtype, size in ((torch.int64, 8), (torch.int32, 4), (torch.int16, 2)):
        if row.shape[1] % size == 0 and row.stride(0) % size == 0 and row.storage_offset() % size == 0:
            return row.view(dtype)
    return row


def _triton_copier(rows: Sequence[torch.Tensor]) -> Copier:
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator,unused-ignore]
    def move(table, index, buffer, blocks, words, GATHER: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
        pair = tl.program_id(0).to(tl.int64)
        segment = pair // blocks
        number = pair % blocks
        base = tl.load(table + 2 * segment)
        stride = tl.load(table + 2 * segment + 1)
        block = tl.load(index + number)
        at = tl.program_id(1) * TILE + tl.arange(0, TILE)
        mask = at < words
        pool = tl.multiple_of(base + block * stride, 16).to(tl.pointer_type(tl.int64))
        slot = buffer + tl.multiple_of(pair * words, 2)
        if GATHER:
            tl.store(slot + at, tl.load(pool + at, mask=mask), mask=mask)
        else:
            tl.store(pool + at, tl.load(slot + at, mask=mask), mask=mask)

    words = rows[0].shape[1] // _WORD
    table = _table(rows, rows[0].device)

    def run(blocks: torch.Tensor, buffer: torch.Tensor, gather: bool) -> None:
        grid = (len(rows) * len(blocks), triton.cdiv(words, _TILE_WORDS))
        move[grid](
            table,
            blocks,
            buffer.view(torch.int64),
            len(blocks),
            words,
            GATHER=gather,
            TILE=_TILE_WORDS,
            num_warps=8,
        )

    return run


def _table(rows: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Address and stride of every segment, for a kernel."""
    return torch.tensor([[row.data_ptr(), row.stride(0)] for row in rows], device=device)


def _triton_mover(source: Sequence[torch.Tensor], target: Sequence[torch.Tensor]) -> Mover:
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator,unused-ignore]
    def move(sources, targets, take, put, blocks, words, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
        pair = tl.program_id(0).to(tl.int64)
        segment = pair // blocks
        number = pair % blocks
        near = tl.load(sources + 2 * segment) + tl.load(take + number) * tl.load(sources + 2 * segment + 1)
        far = tl.load(targets + 2 * segment) + tl.load(put + number) * tl.load(targets + 2 * segment + 1)
        at = tl.program_id(1) * TILE + tl.arange(0, TILE)
        mask = at < words
        begin = tl.multiple_of(near, 16).to(tl.pointer_type(tl.int64))
        end = tl.multiple_of(far, 16).to(tl.pointer_type(tl.int64))
        tl.store(end + at, tl.load(begin + at, mask=mask), mask=mask)

    device = target[0].device
    words = target[0].shape[1] // _WORD
    tables = [_table(rows, device) for rows in (source, target)]

    def run(take: torch.Tensor, put: torch.Tensor) -> None:
        grid = (len(target) * len(take), triton.cdiv(words, _TILE_WORDS))
        move[grid](*tables, take, put, len(take), words, TILE=_TILE_WORDS, num_warps=8)

    return run
