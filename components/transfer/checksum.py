# SPDX-License-Identifier: Apache-2.0
"""Checksums of KV blocks, over all regions of an agent, computed where the memory is.

The sum is a linear hash: words of the block times odd position weights, summed with 64-bit wrap-around. It
finds every changed word and every swap of unequal words. It does not protect against an adversary on the transport.

Where blocks divide into KV heads there is a sum for each head (``heads.Unit``), whose weights are those of the words'
places in the head: engines of other tensor-parallel sizes get the same sums. Callable from any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from components.transfer.data.kernels import SumPart, kernels_take, summer
from components.transfer.heads import Unit, held, units_of
from components.transfer.layout import rows_of
from components.transfer.shares import Shares, depth_of, pieces_of

_AT_ONCE_BYTES = 64 << 20
"""Most temporary words of one step."""
_STEP = 0x9E_3779_B97F_4A7_C1


@dataclass(frozen=True)
class _Summed:
    """Bytes of each block that are summed with weights from their begin on."""

    view: torch.Tensor
    """Bytes, blocks first; the other axes are in the order of the weights."""
    place: int
    unit: int
    parts: tuple[SumPart, ...]
    """The same as dense pieces."""


class BlockChecksums:
    """Checksums of blocks of registered memory."""

    def __init__(self, shares: Shares) -> None:
        self._summed = _heads(shares) if shares.pools else _whole(shares)
        self._block_bytes = max(1, sum(each.view[0].numel() for each in self._summed))
        self.units = len(units_of((pool.heads for pool in shares.pools), shares.rank)) or 1
        """Checksums of each block."""
        self._weights: dict[int, torch.Tensor] = {}
        self._stream: torch.cuda.Stream | None = None
        self._add_up = None
        if self._summed and self._summed[0].view.is_cuda:
            # High priority, and in a stream apart from the engine's steps.
            self._stream = torch.cuda.Stream(self._device, priority=-1)  # type: ignore[no-untyped-call]
            parts = [part for each in self._summed for part in each.parts]
            if kernels_take([part.row for part in parts]):
                self._add_up = summer(parts, self.units, _STEP)

    def of(self, blocks: Sequence[int]) -> tuple[int, ...]:
        """``units`` checksums (63 bits, unsigned) for each block. Waits only for its own work on the device."""
        if self._stream is None:
            return self.begin(blocks)()
        with torch.cuda.stream(self._stream):
            return self.begin(blocks)()

    def begin(self, blocks: Sequence[int]) -> Callable[[], tuple[int, ...]]:
        """Queue the work on the current stream and return at once. Calling the result waits for it."""
        if not blocks or not self._summed:
            zeros = (0,) * len(blocks) * self.units
            return lambda: zeros
        # A kernel needs no temporary words.
        step = len(blocks) if self._add_up is not None else max(1, _AT_ONCE_BYTES // self._block_bytes)
        found = [_to_host(self._sum(list(blocks[at : at + step]))) for at in range(0, len(blocks), step)]
        done = torch.cuda.current_stream(self._device).record_event() if self._stream is not None else None

        def result() -> tuple[int, ...]:
            if done is not None:
                done.synchronize()
            return tuple(value & 0x7FFF_FFFF_FFFF_FFFF for sums, _ in found for value in sums.flatten().tolist())

        return result

    @property
    def _device(self) -> torch.device:
        return self._summed[0].view.device

    def _sum(self, blocks: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The sums, and what must live until the device has them."""
        index = torch.tensor(blocks, dtype=torch.int64, pin_memory=self._stream is not None)
        if self._add_up is not None:
            return self._add_up(index), index
        # CUDA copies from unpinned memory only after all earlier work of the device.
        return self._sum_of(index.to(self._device, non_blocking=True)), index

    def _sum_of(self, index: torch.Tensor) -> torch.Tensor:
        # Equal pieces are summed together: for single ones the calls cost more than the bytes.
        alike: dict[int, list[_Summed]] = {}
        for each in self._summed:
            alike.setdefault(each.view[0].numel(), []).append(each)
        total = torch.zeros((self.units, len(index)), dtype=torch.int64, device=self._device)
        for same in alike.values():
            data = torch.stack([each.view.index_select(0, index).flatten(1) for each in same])
            word = next(t for t in (torch.int64, torch.int32, torch.int16, torch.uint8) if _fits(data, t))
            words = data.view(word).to(torch.int64)
            sums = _weighted(words, self._weight(words.shape[2]))
            odd, unit = torch.tensor([[2 * each.place + 1, each.unit] for each in same]).to(self._device).unbind(1)
            total.index_add_(0, unit, sums * odd[:, None])
        return total.T.contiguous()

    def _weight(self, length: int) -> torch.Tensor:
        if length not in self._weights:
            steps = torch.arange(1, length + 1, dtype=torch.int64, device=self._device)
            self._weights[length] = (steps * _STEP) | 1
        return self._weights[length]


def _whole(shares: Shares) -> list[_Summed]:
    rows = enumerate(rows_of(shares.regions))
    return [_Summed(row, place, 0, (SumPart(row, place, 0, 0),)) for place, row in rows]


def _heads(shares: Shares) -> list[_Summed]:
    units = units_of((pool.heads for pool in shares.pools), shares.rank)
    found = []
    for place, pool in enumerate(shares.pools):
        depth = depth_of(pool)
        for number, head in enumerate(held(pool.heads, shares.rank)):
            unit = units.index(Unit(pool.heads, head))
            rows = shares.views(list(pieces_of(pool, number, depth)))
            parts = tuple(SumPart(row, place, n * row.shape[1], unit) for n, row in enumerate(rows))
            counts, strides = zip(*pool.axes, strict=True)
            address, shape = pool.address + number * pool.head_stride, (rows[0].shape[0], *counts)
            view = shares.view(address, shape, (pool.stride, *strides))
            found.append(_Summed(view, place, unit, parts))
    return found


def _to_host(found: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    sums, index = found
    if not sums.is_cuda:
        return sums, index
    return torch.empty_like(sums, device="cpu", pin_memory=True).copy_(sums, non_blocking=True), index


def _weighted(words: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Sum of words times weights over the last axis, with wrap-around."""
    if words.is_cuda:  # cuBLAS has no product of integers.
        return (words * weight).sum(dim=-1)
    return (words.flatten(0, -2) @ weight).view(words.shape[:-1])


def _fits(data: torch.Tensor, word: torch.dtype) -> bool:
    return data.shape[-1] % torch.empty(0, dtype=word).element_size() == 0
