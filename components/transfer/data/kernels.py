# SPDX-License-Identifier: Apache-2.0
"""Gather, scatter, block-to-block copies and sums of KV blocks: Triton kernels on CUDA, torch's index copies elsewhere.

``copier(blocks, buffer, gather)`` moves the blocks of all segments between the pools and ``buffer``, where segment
follows segment; it queues on the current stream. ``mover(sources, targets, index, stream)`` takes host arrays of
blocks and queues on ``stream``. It writes scattered lists into ``index``, pinned memory for as many numbers, from
which the kernel reads them: a copy to the device would take as long as the launch. ``index`` must not be touched
until the kernel has ended. Streams and the current device must be those of the views.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import groupby
from typing import Any, NamedTuple

import torch

from components.transfer.layout import Ints, is_one_run

Copier = Callable[[torch.Tensor, torch.Tensor, bool], None]
Mover = Callable[[Ints, Ints, torch.Tensor, torch.cuda.Stream], None]
Summer = Callable[[torch.Tensor], torch.Tensor]
_WORD = 8
_TILE_WORDS = 8192
_WARPS = 8
_SUM_TILE = 2048


def copier(rows: Sequence[torch.Tensor]) -> Copier:
    """The fastest copier for these (blocks, bytes) views."""
    parts = [list(part) for _, part in groupby(rows, key=lambda row: row.shape[1])]
    made = [
        (_triton_copier(part) if kernels_take(part) else _torch_copier(part), len(part) * part[0].shape[1])
        for part in parts
    ]
    if len(made) == 1:
        return made[0][0]

    def run(blocks: torch.Tensor, buffer: torch.Tensor, gather: bool) -> None:
        start = 0
        for each, size in made:
            each(blocks, buffer[start : start + size * len(blocks)], gather)
            start += size * len(blocks)

    return run


def mover(source: Sequence[torch.Tensor], target: Sequence[torch.Tensor]) -> Mover:
    """Copies blocks of one set of views directly into those of another on the same device.

    Compiles kernels and makes tables: make one mover for a pair of agents, not one for each transfer.
    """
    alike: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for pair in zip(source, target, strict=True):
        alike.setdefault(pair[0].shape[1], []).append(pair)
    made = [
        _triton_mover(pairs) if kernels_take([row for pair in pairs for row in pair]) else _torch_mover(pairs)
        for _, pairs in sorted(alike.items())
    ]
    return made[0] if len(made) == 1 else _together(made)


class SumPart(NamedTuple):
    """Memory that is summed: a (blocks, bytes) view, its place among others, the bytes before it that have weights too,
    and the unit that it counts for."""

    row: torch.Tensor
    place: int
    before: int
    unit: int


def summer(parts: Sequence[SumPart], units: int, step: int) -> Summer:
    """Called with the numbers of blocks in pinned memory, gives the sums of each one's units: see ``checksum.py``.

    A word has the weight ``step`` times its place, from 1, made odd; a part that of its place, made odd.
    The numbers must not change until the device has the sums.
    """
    alike: dict[int, list[SumPart]] = {}
    for part in parts:
        alike.setdefault(part.row.shape[1] // _WORD, []).append(part)
    device = parts[0].row.device
    tables = [
        (
            words,
            len(same),
            torch.tensor(
                [[p.row.data_ptr(), p.row.stride(0), 2 * p.place + 1, p.before // _WORD, p.unit] for p in same],
                device=device,
            ),
        )
        for words, same in alike.items()
    ]
    kernel = _jit()[2]

    def launch(count: int, index: torch.Tensor, sums: torch.Tensor) -> None:
        for words, segments, table in tables:
            grid, tile = (segments * count, 1, 1), min(_SUM_TILE, _tile(words))
            warps = max(1, _WARPS * tile // _SUM_TILE)
            kernel[grid](table, index, sums, count, units, words, STEP=step, TILE=tile, num_warps=warps)

    # A launch without blocks compiles it now.
    launch(0, tables[0][2], tables[0][2])

    def run(index: torch.Tensor) -> torch.Tensor:
        sums = torch.zeros((len(index), units), dtype=torch.int64, device=device)
        launch(len(index), index, sums)
        return sums

    return run


def kernels_take(rows: Sequence[torch.Tensor]) -> bool:
    """True when Triton's kernels can work on these (blocks, bytes) views."""
    if find_spec("triton") is None:
        return False
    whole = all(row.data_ptr() % 16 == 0 and row.stride(0) % 16 == 0 and row.shape[1] % 16 == 0 for row in rows)
    return whole and rows[0].is_cuda and len({row.device for row in rows}) == 1


def _together(movers: Sequence[Mover]) -> Mover:
    def run(sources: Ints, targets: Ints, index: torch.Tensor, stream: torch.cuda.Stream) -> None:
        for each in movers:
            each(sources, targets, index, stream)

    return run


def _torch_copier(rows: Sequence[torch.Tensor]) -> Copier:
    # index_select is several times faster with wider words than with single bytes.
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


def _torch_mover(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Mover:
    def run(sources: Ints, targets: Ints, _: torch.Tensor, stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            take, put = (torch.from_numpy(blocks).to(pairs[0][0].device) for blocks in (sources, targets))
            for source, target in pairs:
                target.index_copy_(0, put, source.index_select(0, take))

    return run


def _widen(row: torch.Tensor) -> torch.Tensor:
    for dtype, size in ((torch.int64, 8), (torch.int32, 4), (torch.int16, 2)):
        if row.shape[1] % size == 0 and row.stride(0) % size == 0 and row.storage_offset() % size == 0:
            return row.view(dtype)
    return row


@cache
def _jit() -> tuple[Any, Any, Any]:
    """All kernels. Arguments that change with every call must not cause new compilations."""
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["index", "blocks"])  # type: ignore[untyped-decorator,unused-ignore]
    def stage(table, index, buffer, blocks, words, GATHER: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
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

    @triton.jit(do_not_specialize=["index", "take", "put", "blocks"])  # type: ignore[untyped-decorator,unused-ignore]
    def move(sources, targets, index, take, put, blocks, words, LIST: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
        pair = tl.program_id(0).to(tl.int64)
        segment = pair // blocks
        number = pair % blocks
        if LIST:
            first = tl.load(index + number)
            second = tl.load(index + blocks + number)
        else:
            first = number + take
            second = number + put
        source = tl.load(sources + 2 * segment) + first * tl.load(sources + 2 * segment + 1)
        target = tl.load(targets + 2 * segment) + second * tl.load(targets + 2 * segment + 1)
        at = tl.program_id(1) * TILE + tl.arange(0, TILE)
        mask = at < words
        read = tl.multiple_of(source, 16).to(tl.pointer_type(tl.int64))
        written = tl.multiple_of(target, 16).to(tl.pointer_type(tl.int64))
        tl.store(written + at, tl.load(read + at, mask=mask), mask=mask)

    @triton.jit(do_not_specialize=["index", "blocks", "units"])  # type: ignore[untyped-decorator,unused-ignore]
    def add_up(table, index, sums, blocks, units, words, STEP: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
        pair = tl.program_id(0).to(tl.int64)
        segment = pair // blocks
        number = pair % blocks
        entry = table + 5 * segment
        base = tl.load(entry) + tl.load(index + number) * tl.load(entry + 1)
        before = tl.load(entry + 3)
        words_of = tl.multiple_of(base, 16).to(tl.pointer_type(tl.int64))
        total = tl.zeros([TILE], dtype=tl.int64)
        for start in range(0, words, TILE):
            at = start + tl.arange(0, TILE)
            weight = ((at.to(tl.int64) + before + 1) * STEP) | 1
            total += tl.load(words_of + at, mask=at < words, other=0) * weight
        tl.atomic_add(sums + number * units + tl.load(entry + 4), tl.sum(total) * tl.load(entry + 2))

    return stage, move, add_up


def _tile(words: int) -> int:
    """Words of one program: a power of two, no larger than a block needs."""
    return min(_TILE_WORDS, 1 << max(7, (words - 1).bit_length()))


def _grid(segments: int, blocks: int, words: int) -> tuple[int, int]:
    return segments * blocks, -(-words // _tile(words))


def _triton_copier(rows: Sequence[torch.Tensor]) -> Copier:
    kernel = _jit()[0]
    words = rows[0].shape[1] // _WORD
    table = _table(rows)

    def launch(grid: tuple[int, int], index: torch.Tensor, slot: torch.Tensor, count: int, gather: bool) -> None:
        kernel[grid](table, index, slot, count, words, GATHER=gather, TILE=_tile(words), num_warps=_WARPS)

    # Launches with no block compile now: the first transfer must not wait for the compiler.
    for gather in (False, True):
        launch((0, 1), table, table, 1, gather)

    def run(blocks: torch.Tensor, buffer: torch.Tensor, gather: bool) -> None:
        grid, count = _grid(len(rows), len(blocks), words), len(blocks)
        launch(grid, blocks, buffer.view(torch.int64), count, gather)

    return run


def _triton_mover(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Mover:
    kernel = _jit()[1]
    words = pairs[0][0].shape[1] // _WORD
    sources, targets = (_table(rows) for rows in zip(*pairs, strict=True))

    # Launches with no block compile now. Calls bypass Triton's dispatch, which takes three times as long.
    tile = _tile(words)
    runs, lists = (
        kernel[(0, 1, 1)](sources, targets, sources, 0, 0, 1, words, LIST=listed, TILE=tile, num_warps=_WARPS)
        for listed in (False, True)
    )

    def run(take: Ints, put: Ints, index: torch.Tensor, stream: torch.cuda.Stream) -> None:
        count = len(take)
        if not count:
            return
        grid = (*_grid(len(pairs), count, words), 1)
        if is_one_run(take) and is_one_run(put):
            first, second = int(take[0]), int(put[0])
            runs[grid](sources, targets, index, first, second, count, words, False, tile, stream=stream.cuda_stream)
            return
        numbers = index.numpy()
        numbers[:count], numbers[count : 2 * count] = take, put
        lists[grid](sources, targets, index, 0, 0, count, words, True, tile, stream=stream.cuda_stream)

    return run


def _table(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Address and stride of every segment, for a kernel."""
    return torch.tensor([[row.data_ptr(), row.stride(0)] for row in rows], device=rows[0].device)
