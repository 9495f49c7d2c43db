# SPDX-License-Identifier: Apache-2.0
"""Checksums of KV blocks, over all pools of an agent, computed where the memory is.

The sum is a 61-bit linear hash: words of the block times odd position weights, summed with 64-bit
wrap-around. It finds every changed word and every swap of unequal words; it is no protection against an
adversary, who would have to sit on the transport itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from components.transfer.config import KVPool


class BlockChecksums:
    """Per-block checksums of registered pools."""

    def __init__(self, pools: Sequence[KVPool]) -> None:
        self._pools = list(pools)
        self._weights: dict[tuple[int, torch.device], torch.Tensor] = {}

    def of(self, blocks: Sequence[int]) -> tuple[int, ...]:
        """One checksum (63 bits, unsigned) for each block."""
        if not blocks:
            return ()
        total: torch.Tensor | None = None
        for position, pool in enumerate(self._pools):
            index = torch.tensor(list(blocks), device=pool.tensor.device)
            rows = pool.tensor.index_select(pool.block_dim, index).movedim(pool.block_dim, 0)
            data = rows.reshape(len(blocks), -1).contiguous().view(torch.uint8)
            word = next(t for t in (torch.int64, torch.int32, torch.int16, torch.uint8) if _fits(data, t))
            words = data.view(word).to(torch.int64)
            part = (words * self._weight(words.shape[1], words.device)).sum(dim=1) * (2 * position + 1)
            total = part if total is None else total + part
        if total is None:
            return (0,) * len(blocks)
        return tuple(value & 0x7FFF_FFFF_FFFF_FFFF for value in total.tolist())

    def _weight(self, length: int, device: torch.device) -> torch.Tensor:
        key = (length, device)
        if key not in self._weights:
            steps = torch.arange(1, length + 1, dtype=torch.int64, device=device)
            self._weights[key] = (steps * 0x9E37_79B9_7F4A_7C1) | 1
        return self._weights[key]


def _fits(data: torch.Tensor, word: torch.dtype) -> bool:
    return data.shape[1] % torch.empty(0, dtype=word).element_size() == 0
