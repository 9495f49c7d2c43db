# SPDX-License-Identifier: Apache-2.0
"""Chunks of blocks between an agent's pools and host memory.

In host memory a chunk has segment after segment, each with all its blocks. Pools on a GPU go through one device buffer
and a separate stream; the host side should be pinned (``host_memory``).
Threading: worker thread only. The caller guarantees that nobody writes the blocks meanwhile, and that nobody reads
them during ``load`` before the gate is ready.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

import torch

from components.transfer import profiling
from components.transfer.data import kernels
from components.transfer.data.staging import Gate
from components.transfer.layout import Ints, Region, block_bytes
from components.transfer.parking.ticket import Ticket

Steps = Generator[bool, None, None]
Chunks = Sequence[tuple[int, int]]
"""Block ranges (first, past the last), each copied as one chunk."""
Finish = Callable[[], Ticket]
"""Makes the ticket after all blocks have been read."""
_CHUNK_BYTES = 4 << 20


def host_memory(size: int, pinned: bool) -> torch.Tensor:
    """Host memory: pinned for pools on a GPU, plain otherwise."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)


class Loader:
    """See the module docstring."""

    def __init__(self, regions: Sequence[Region]) -> None:
        rows = [row for region in regions for row in region.rows]
        self.device = rows[0].device
        self.num_blocks = rows[0].shape[0]
        self.block_bytes = block_bytes(regions)
        self.chunk_blocks = max(1, _CHUNK_BYTES // self.block_bytes)
        self.chunk_bytes = self.chunk_blocks * self.block_bytes
        self.pinned = self.device.type == "cuda"
        self._copier = kernels.copier(rows)
        self._stream: torch.cuda.Stream | None = None
        self._buffer = torch.empty(0)
        if self.pinned:
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            self._buffer = torch.empty(self.chunk_bytes, dtype=torch.uint8, device=self.device)

    def index(self, blocks: Ints) -> torch.Tensor:
        """Block ids on the device that copies."""
        return torch.from_numpy(blocks).to(self.device)

    def unload(self, index: torch.Tensor, host: torch.Tensor) -> Gate:
        """Copy blocks into host memory."""
        return self._copy(index, host, gather=True)

    def load(self, index: torch.Tensor, host: torch.Tensor) -> Gate:
        """Copy host memory into blocks."""
        return self._copy(index, host, gather=False)

    def _copy(self, index: torch.Tensor, host: torch.Tensor, gather: bool) -> Gate:
        size = len(index) * self.block_bytes
        with profiling.span("gather" if gather else "scatter", size):
            return self._queue(index, host, gather, size)

    def _queue(self, index: torch.Tensor, host: torch.Tensor, gather: bool, size: int) -> Gate:
        if self._stream is None:
            self._copier(index, host, gather)
            return Gate(None)
        device, parked = self._buffer[:size], host[:size]
        with torch.cuda.stream(self._stream):
            if gather:
                self._copier(index, device, True)
                parked.copy_(device, non_blocking=True)
            else:
                device.copy_(parked, non_blocking=True)
                self._copier(index, device, False)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return Gate(event)
