# SPDX-License-Identifier: Apache-2.0
"""Bounded, registered buffers in which scattered blocks become one piece of memory.

A slot holds a chunk of blocks: segment after segment, each with all its blocks. With a peer of another tensor-parallel
size it holds the heads that both have (``Packing``). Half of the slots send and half
receive, so that two agents that fetch from each other cannot starve. Few large slots beat many small ones: each
chunk costs some 0.3 ms of launches and messages (docs/design-notes.md).
Threading: worker thread only. On CUDA all work is queued on a separate stream; ``Gate.ready`` is True when it is
done. The caller guarantees that the engine's writes to the blocks have ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from components.transfer import profiling
from components.transfer.data import kernels
from components.transfer.layout import Ints, Region, Span, block_bytes, groups_of, rows_of
from components.transfer.shares import Share


@dataclass(frozen=True)
class Gate:
    """Completion of a gather or scatter."""

    event: torch.cuda.Event | None

    def ready(self) -> bool:
        """True once the copy has ended."""
        return self.event is None or bool(self.event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Return once it has ended."""
        if self.event is not None:
            self.event.synchronize()


@dataclass(frozen=True)
class Packing:
    """The pieces of a block that are in a slot."""

    copier: kernels.Copier
    block_bytes: int


class Staging:
    """Slots of equal size and the copies between them and the pools."""

    def __init__(self, regions: Sequence[Region], limit_bytes: int, slots: int = 4) -> None:
        rows = rows_of(regions)
        self.device = rows[0].device
        self.block_bytes = block_bytes(regions)
        # A slot has room for at least one block, whatever the limit.
        self.blocks_per_slot = max(1, limit_bytes // slots // self.block_bytes)
        self.slot_bytes = -(-self.blocks_per_slot * self.block_bytes // 512) * 512
        self.buffer = torch.empty(slots * self.slot_bytes, dtype=torch.uint8, device=self.device)
        self.side = slots // 2
        """Slots for each direction; a transfer takes all free ones."""
        self._free = {"send": list(range(self.side)), "receive": list(range(self.side, slots))}
        self._stream = _stream(self.device)
        self._whole = Packing(kernels.copier(rows), self.block_bytes)
        self._packings: WeakKeyDictionary[Share, Packing] = WeakKeyDictionary()

    @property
    def memory(self) -> Span:
        """Memory of all slots."""
        return Span(self.buffer.data_ptr(), self.buffer.numel())

    def address(self, slot: int) -> int:
        """Address of a slot."""
        return int(self.buffer.data_ptr()) + slot * self.slot_bytes

    def acquire(self, side: str, count: int) -> list[int]:
        """Up to ``count`` free slots of a side; may be empty."""
        free = self._free[side]
        taken, self._free[side] = free[:count], free[count:]
        return taken

    def release(self, side: str, slots: Sequence[int]) -> None:
        """Release slots."""
        self._free[side].extend(slots)

    def packing(self, share: Share) -> Packing:
        """For the blocks that are exchanged with a peer; compiled at the first call."""
        if share.whole:
            return self._whole
        if share not in self._packings:
            with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
                self._packings[share] = Packing(kernels.copier(share.rows), share.block_bytes)
        return self._packings[share]

    def chunks(self, count: int, slot_bytes: int, packing: Packing) -> list[tuple[int, int]]:
        """Block ranges that fit a local slot and one of ``slot_bytes`` at the peer."""
        size = min(self.slot_bytes, slot_bytes) // packing.block_bytes
        return groups_of(count, max(1, size))

    def index(self, blocks: Ints) -> torch.Tensor:
        """Block ids on the device that copies; made once for each transfer."""
        if self._stream is None:
            return torch.from_numpy(blocks)
        with torch.cuda.stream(self._stream):
            return torch.from_numpy(blocks).to(self.device, non_blocking=True)

    def gather(self, blocks: torch.Tensor, slot: int, packing: Packing) -> Gate:
        """Copy blocks into a slot."""
        return self._run(blocks, slot, packing, gather=True)

    def scatter(self, blocks: torch.Tensor, slot: int, packing: Packing) -> Gate:
        """Copy a slot into blocks."""
        return self._run(blocks, slot, packing, gather=False)

    def _run(self, blocks: torch.Tensor, slot: int, packing: Packing, gather: bool) -> Gate:
        with profiling.span("gather" if gather else "scatter", len(blocks) * packing.block_bytes):
            return self._copy(blocks, slot, packing.copier, gather)

    def _copy(self, blocks: torch.Tensor, slot: int, copier: kernels.Copier, gather: bool) -> Gate:
        start = slot * self.slot_bytes
        buffer = self.buffer[start : start + self.slot_bytes]
        if self._stream is None:
            copier(blocks, buffer, gather)
            return Gate(None)
        with torch.cuda.stream(self._stream):
            copier(blocks, buffer, gather)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return Gate(event)


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    if device.type != "cuda":
        return None
    # Of high priority, and not behind the engine's steps in the default stream.
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
