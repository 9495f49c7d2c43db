# SPDX-License-Identifier: Apache-2.0
"""KV bytes and the tokens computed from them.

``write`` fills the slots of one position from the token, the position and the KV before it. ``next_token`` reads
every KV byte of the request, so one wrong, stale or missing byte changes the tokens. Nothing is sampled from
probabilities: all sampling options and the request's generator are mixed into each token, so a request that
arrives without one of them also gets other tokens.

KV tensors: one for each layer, (blocks, tokens of a block, words), int64, CPU.
Threading: one asyncio loop; a transfer's thread may copy other blocks meanwhile.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from components.engine.protocol import Sampling
from components.transfer import KVPool

MASK = (1 << 64) - 1
STEP = 0x9E37_79B9_7F4A_7C15
Words = npt.NDArray[np.uint64]


def mix(value: int) -> int:
    """A 64-bit number, each bit of which depends on every bit of ``value`` (splitmix64)."""
    value = (value + STEP) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58_476D_1CE4_E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D0_49BB_1331_11EB) & MASK
    return value ^ (value >> 31)


def salt_of(sampling: Sampling, seed: int) -> int:
    """Hash of the sampling options, part of every token. ``seed`` is the engine's.

    It leaves out the bound of the answer's length, which a frontend lowers when it repeats a request.
    """
    # By value: on the wire a temperature of 0 becomes 0.0.
    travelled = msgspec.msgpack.decode(msgspec.msgpack.encode(sampling), type=Sampling)
    travelled = msgspec.structs.replace(travelled, max_tokens=None)
    return mix(zlib.crc32(msgspec.msgpack.encode(msgspec.structs.astuple(travelled))) ^ (seed << 32))


def generator_of(sampling: Sampling, drawn: int) -> int:
    """State of the request's generator after ``drawn`` tokens; 0 without a generator."""
    if sampling.seed is None or sampling.temperature == 0:
        return 0
    return mix(sampling.seed) + drawn & MASK


class PagedKV:
    """The KV tensors of an engine."""

    def __init__(self, num_blocks: int, block_size: int, layers: int, words: int, vocab_size: int) -> None:
        self.block_size = block_size
        self._vocab_size = vocab_size
        shape = (num_blocks, block_size, words)
        self._tensors = [torch.zeros(shape, dtype=torch.int64) for _ in range(layers)]
        self.planes: list[Words] = [tensor.numpy().view(np.uint64) for tensor in self._tensors]
        self.spread = np.arange(1, words + 1, dtype=np.uint64) * np.uint64(STEP) | np.uint64(1)
        self._weights = np.empty(0, dtype=np.uint64)

    def pools(self) -> list[KVPool]:
        """What a transfer agent registers."""
        return [KVPool(f"layer.{i}", tensor, tensor.shape[0], block_dim=0) for i, tensor in enumerate(self._tensors)]

    @property
    def bytes_per_token(self) -> int:
        """KV bytes of one position over all layers."""
        return sum(plane.shape[2] * 8 for plane in self.planes)

    def write(self, token: int, position: int, blocks: Sequence[int]) -> None:
        """Fill one position. ``blocks`` are the request's, in order; the previous position must be filled."""
        block, slot = blocks[position // self.block_size], position % self.block_size
        below = mix(token << 20 ^ position)
        for index, plane in enumerate(self.planes):
            before = 0
            if position:
                earlier = plane[blocks[(position - 1) // self.block_size], (position - 1) % self.block_size]
                before = int((earlier * self.spread).sum())
            below = mix(below ^ mix(before + index))
            plane[block, slot] = self.spread * np.uint64(below | 1)

    def next_token(self, num_tokens: int, blocks: Sequence[int], salt: int, generator: int) -> int:
        """The token after ``num_tokens`` filled positions."""
        used = -(-num_tokens // self.block_size)
        index = np.asarray(blocks[:used], dtype=np.int64)
        total = 0
        for number, plane in enumerate(self.planes):
            read = plane[index].reshape(-1)[: num_tokens * plane.shape[2]]
            # With odd weights the change of a single word never cancels out.
            total += int((read * self._odd(len(read))).sum()) * (2 * number + 1)
        return mix((total ^ salt ^ mix(generator)) & MASK) % self._vocab_size

    def _odd(self, length: int) -> Words:
        if len(self._weights) < length:
            steps = np.arange(1, 2 * length + 1, dtype=np.uint64)
            self._weights = steps * np.uint64(STEP & ~0xFF) | np.uint64(1)
        return self._weights[:length]
