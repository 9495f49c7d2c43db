# SPDX-License-Identifier: Apache-2.0
"""Checksums of KV blocks, over all pools of an agent, computed where the memory is.

The sum is a linear hash: words of the block times odd position weights, summed with 64-bit wrap-around. It
finds every changed word and every swap of unequal words. It does not protect against an adversary on the transport.
Callable from any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from components.transfer.config import KVPool

_AT_ONCE_BYTES = 64 << 20
"""Most temporary words of one step."""


class BlockChecksums:
    """Per-block checksums of registered pools."""

    def __init__(self, pools: Sequence[KVPool]) -> None:
        self._pools = list(pools)
        self._block_bytes = max(1, sum(p.tensor.numel() * p.tensor.element_size() // p.num_blocks for p in pools))
        self._weights: dict[tuple[int, torch.device], torch.Tensor] = {}

    def of(self, blocks: Sequence[int]) -> tuple[int, ...]:
        """One checksum (63 bits, unsigned) for each block."""
        return self.begin(blocks)()

    def begin(self, blocks: Sequence[int]) -> Callable[[], tuple[int, ...]]:
        """Queue the work on the device and return at once. Calling the result waits for it."""
        if not blocks or not self._pools:
            zeros = (0,) * len(blocks)
            return lambda: zeros
        step = max(1, _AT_ONCE_BYTES // self._block_bytes)
        found = [_to_host(self._sum(blocks[at : at + step])) for at in range(0, len(blocks), step)]
        done = torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None

        def result() -> tuple[int, ...]:
            if done is not None:
                done.synchronize()
            return tuple(value & 0x7FFF_FFFF_FFFF_FFFF for sums in found for value in sums.tolist())

        return result

    @property
    def _device(self) -> torch.device:
        return self._pools[0].tensor.device

    def _sum(self, blocks: Sequence[int]) -> torch.Tensor:
        device = self._device
        index = _to_device(list(blocks), device)
        # Equal pools are summed together: for single layers the calls cost more than the bytes.
        alike: dict[tuple[torch.dtype, int], list[tuple[int, torch.Tensor]]] = {}
        for position, pool in enumerate(self._pools):
            row = pool.tensor.index_select(pool.block_dim, index).movedim(pool.block_dim, 0).reshape(len(blocks), -1)
            alike.setdefault((row.dtype, row.shape[1]), []).append((position, row))
        total = torch.zeros(len(blocks), dtype=torch.int64, device=device)
        for rows in alike.values():
            data = torch.stack([row for _, row in rows]).view(torch.uint8)
            word = next(t for t in (torch.int64, torch.int32, torch.int16, torch.uint8) if _fits(data, t))
            words = data.view(word).to(torch.int64)
            sums = _weighted(words, self._weight(words.shape[2], device))
            odd = _to_device([2 * position + 1 for position, _ in rows], device)
            total += (sums * odd[:, None]).sum(dim=0)
        return total

    def _weight(self, length: int, device: torch.device) -> torch.Tensor:
        key = (length, device)
        if key not in self._weights:
            steps = torch.arange(1, length + 1, dtype=torch.int64, device=device)
            self._weights[key] = (steps * 0x9E37_79B9_7F4A_7C1) | 1
        return self._weights[key]


def _to_device(numbers: list[int], device: torch.device) -> torch.Tensor:
    # CUDA copies from unpinned memory only after all earlier work of the device.
    return torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _to_host(found: torch.Tensor) -> torch.Tensor:
    if not found.is_cuda:
        return found
    return torch.empty_like(found, device="cpu", pin_memory=True).copy_(found, non_blocking=True)


def _weighted(words: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Sum of words times weights over the last axis, with wrap-around."""
    if words.is_cuda:  # cuBLAS has no product of integers.
        return (words * weight).sum(dim=-1)
    return (words.flatten(0, -2) @ weight).view(words.shape[:-1])


def _fits(data: torch.Tensor, word: torch.dtype) -> bool:
    return data.shape[-1] % torch.empty(0, dtype=word).element_size() == 0
