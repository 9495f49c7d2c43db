# SPDX-License-Identifier: Apache-2.0
"""``PagedKV`` on a torch device: the same bytes and tokens, all layers in one tensor, no copy to the host.

A step reads every KV byte of its requests, as the attention of a decoding model does. Threading: as ``PagedKV``;
every step ends with a result on the host, so that all blocks of an offer have been written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from components.engine.paged.model import MASK, STEP, PagedKV, mix
from components.transfer import KVPool


class DeviceKV(PagedKV):
    """KV tensors on ``device``. int64 wraps as uint64 does."""

    def __init__(self, device: str, num_blocks: int, block_size: int, layers: int, words: int, vocab_size: int) -> None:
        super().__init__(1, block_size, layers, words, vocab_size)
        self._kv = torch.zeros((layers, num_blocks, block_size, words), dtype=torch.int64, device=device)
        self._steps = torch.from_numpy(self._spread.view("int64")).to(device)
        self._odd_weights = torch.empty(0, dtype=torch.int64, device=device)

    def pools(self) -> list[KVPool]:
        """See ``PagedKV``."""
        return [KVPool(f"layer.{i}", kv, kv.shape[0], block_dim=0) for i, kv in enumerate(self._kv)]

    def write(self, token: int, position: int, blocks: Sequence[int]) -> None:
        """See ``PagedKV``."""
        before = [0] * self._kv.shape[0]
        if position:
            earlier = self._kv[:, blocks[(position - 1) // self.block_size], (position - 1) % self.block_size]
            before = (earlier * self._steps).sum(dim=1).tolist()
        below = mix(token << 20 ^ position)
        values = []
        for index, value in enumerate(before):
            below = mix(below ^ mix((value & MASK) + index))
            values.append(_signed(below | 1))
        column = torch.tensor(values, device=self._kv.device).unsqueeze(1)
        self._kv[:, blocks[position // self.block_size], position % self.block_size] = column * self._steps

    def next_token(self, num_tokens: int, blocks: Sequence[int], salt: int, generator: int) -> int:
        """See ``PagedKV``."""
        index = torch.tensor(blocks[: -(-num_tokens // self.block_size)], device=self._kv.device)
        read = self._kv[:, index].flatten(1)[:, : num_tokens * self._kv.shape[3]]
        sums = (read * self._odds(read.shape[1])).sum(dim=1).tolist()
        total = sum(value * (2 * number + 1) for number, value in enumerate(sums))
        return mix((total ^ salt ^ mix(generator)) & MASK) % self._vocab_size

    def _odds(self, length: int) -> torch.Tensor:
        if len(self._odd_weights) < length:
            steps = torch.arange(1, 2 * length + 1, dtype=torch.int64, device=self._kv.device)
            self._odd_weights = steps * _signed(STEP & ~0xFF) | 1
        return self._odd_weights[:length]


def _signed(value: int) -> int:
    """The same 64 bits as a signed number, for torch's int64."""
    return value - (1 << 64) if value >> 63 else value
