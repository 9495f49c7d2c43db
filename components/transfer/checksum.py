# SPDX-License-Identifier: Apache-2.0
"""Checksums of KV blocks, over all regions of an agent, computed where the memory is.

The sum is a linear hash: words of the block times odd position weights, summed with 64-bit wrap-around. It
finds every changed word and every swap of unequal words. It does not protect against an adversary on the transport.
Callable from any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from components.transfer.data.kernels import kernels_take, summer
from components.transfer.layout import Region, rows_of

_AT_ONCE_BYTES = 64 << 20
"""Most temporary words of one step."""
_STEP = 0x9E_3779_B97F_4A7_C1


class BlockChecksums:
    """Per-block checksums of registered memory."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self._rows = rows_of(regions)
        self._block_bytes = max(1, sum(row.shape[1] for row in self._rows))
        self._weights: dict[int, torch.Tensor] = {}
        self._stream: torch.cuda.Stream | None = None
        self._add_up = None
        if self._rows and self._rows[0].is_cuda:
            # Of high priority, and never behind the engine's steps in the stream of those.
            self._stream = torch.cuda.Stream(self._rows[0].device, priority=-1)  # type: ignore[no-untyped-call]
            if kernels_take(self._rows):
                self._add_up = summer(self._rows, _STEP)

    def of(self, blocks: Sequence[int]) -> tuple[int, ...]:
        """One checksum (63 bits, unsigned) for each block. Waits for no work of the device's but its own."""
        if self._stream is None:
            return self.begin(blocks)()
        with torch.cuda.stream(self._stream):
            return self.begin(blocks)()

    def begin(self, blocks: Sequence[int]) -> Callable[[], tuple[int, ...]]:
        """Queue the work on the current stream and return at once. Calling the result waits for it."""
        if not blocks or not self._rows:
            zeros = (0,) * len(blocks)
            return lambda: zeros
        # A kernel needs no temporary words.
        step = len(blocks) if self._add_up is not None else max(1, _AT_ONCE_BYTES // self._block_bytes)
        found = [_to_host(self._sum(list(blocks[at : at + step]))) for at in range(0, len(blocks), step)]
        done = torch.cuda.current_stream(self._device).record_event() if self._stream is not None else None

        def result() -> tuple[int, ...]:
            if done is not None:
                done.synchronize()
            return tuple(value & 0x7FFF_FFFF_FFFF_FFFF for sums, _ in found for value in sums.tolist())

        return result

    @property
    def _device(self) -> torch.device:
        return self._rows[0].device

    def _sum(self, blocks: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The sums, and what must live until the device has them."""
        index = torch.tensor(blocks, dtype=torch.int64, pin_memory=self._stream is not None)
        if self._add_up is not None:
            return self._add_up(index), index
        # CUDA copies from unpinned memory only after all earlier work of the device.
        return self._sum_of(index.to(self._device, non_blocking=True)), index

    def _sum_of(self, index: torch.Tensor) -> torch.Tensor:
        # Equal rows are summed together: for single ones the calls cost more than the bytes.
        alike: dict[int, list[tuple[int, torch.Tensor]]] = {}
        for position, row in enumerate(self._rows):
            alike.setdefault(row.shape[1], []).append((position, row.index_select(0, index)))
        total = torch.zeros(len(index), dtype=torch.int64, device=self._device)
        for rows in alike.values():
            data = torch.stack([row for _, row in rows])
            word = next(t for t in (torch.int64, torch.int32, torch.int16, torch.uint8) if _fits(data, t))
            words = data.view(word).to(torch.int64)
            sums = _weighted(words, self._weight(words.shape[2]))
            odd = torch.tensor([2 * position + 1 for position, _ in rows], dtype=torch.int64)
            total += (sums * odd.to(self._device)[:, None]).sum(dim=0)
        return total

    def _weight(self, length: int) -> torch.Tensor:
        if length not in self._weights:
            steps = torch.arange(1, length + 1, dtype=torch.int64, device=self._device)
            self._weights[length] = (steps * _STEP) | 1
        return self._weights[length]


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
