# SPDX-License-Identifier: Apache-2.0
"""Blocks between agents of one process (copies between tensors), and over CUDA IPC between processes.

Threading: worker thread; a CUDA copy is queued and polled, a host copy is done in bounded steps. ``LocalBackend``
reaches agents by a table of this process; ``IpcBackend`` maps a peer's device memory once and then copies with
one kernel, also scattered to scattered. Errors: ``TransferError``.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any, ClassVar, NoReturn

import msgspec
import torch

from components.errors import TransferError
from components.transfer.config import Strategy, TransferResult
from components.transfer.control.record import AgentRecord
from components.transfer.data import kernels
from components.transfer.data.base import Copy, Steps
from components.transfer.layout import Region, put, rows_of, take

_STEP_BLOCKS = 64


def _copy_rows(copy: Copy, src: Sequence[torch.Tensor], dst: Sequence[torch.Tensor], push: bool, lane: str) -> Steps:
    """Copy block rows segment by segment."""
    ours, theirs = torch.from_numpy(copy.ours), torch.from_numpy(copy.theirs)
    here, there = (ours, theirs) if push else (theirs, ours)
    total = 0
    if not copy.unit and len(src) == len(dst) and (move := kernels.mover(src, dst)) is not None:
        move(here.to(dst[0].device), there.to(dst[0].device))
        total = len(here) * sum(row.shape[1] for row in dst)
        yield True
        yield from _finished(dst[0])
        copy.arrived(total)
        strategy = Strategy.WRITE if push else Strategy.READ
        return TransferResult(total, len(src) * len(here), lane=lane, strategy=strategy)
    for source, target in zip(src, dst, strict=True):
        if source.shape[-1] != target.shape[-1]:
            raise TransferError(f"blocks of agent {copy.peer.name} have another size")
        for start in range(0, len(here), _STEP_BLOCKS):
            near, far = here[start : start + _STEP_BLOCKS], there[start : start + _STEP_BLOCKS]
            part = take(source, near.to(source.device)).to(target.device)
            put(target, far.to(target.device), part)
            total += part.numel()
            copy.arrived(part.numel())
            yield True
    for tensor in (src[0], dst[0]):
        if tensor.is_cuda:
            yield from _finished(tensor)
    strategy = Strategy.WRITE if push else Strategy.READ
    return TransferResult(total, len(src) * len(copy.ours), lane=lane, strategy=strategy)


def _finished(tensor: torch.Tensor) -> Generator[bool, None, None]:
    """Wait for what was queued on the tensor's device."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(tensor.device))
    while not event.query():  # type: ignore[no-untyped-call]
        yield False


def _nothing() -> Generator[bool, None, TransferResult]:
    return TransferResult()
    yield False


class LocalBackend:
    """Copies between agents of this process."""

    _agents: ClassVar[dict[str, Callable[[int], list[torch.Tensor]]]] = {}
    """Views of an agent's memory by unit."""

    def __init__(self, epoch: str, regions: Sequence[Region], block_size: int) -> None:
        self._epoch = epoch
        self._rows = partial(rows_of, list(regions), block_size)
        self._agents[epoch] = self._rows

    @property
    def lane(self) -> str:
        """``local/memcpy``."""
        return "local/memcpy"

    def reaches(self, peer: AgentRecord) -> bool:
        """True when the peer lives in this process."""
        return peer.epoch in self._agents

    def fetch(self, copy: Copy) -> Steps:
        """See ``Backend``."""
        source = self._agents[copy.peer.epoch]
        return _copy_rows(copy, source(copy.unit), self._rows(copy.unit), False, self.lane)

    def push(self, copy: Copy) -> Steps:
        """See ``Backend``."""
        target = self._agents[copy.peer.epoch]
        return _copy_rows(copy, self._rows(copy.unit), target(copy.unit), True, self.lane)

    def warm_up(self, copy: Copy) -> Steps:
        """Nothing to connect."""
        return _nothing()

    def progress(self) -> list[Generator[bool, None, None]]:
        """Nobody asks over this lane."""
        return []

    def close(self) -> None:
        """Leave the table."""
        self._agents.pop(self._epoch, None)


class _Handle(msgspec.Struct, frozen=True, array_like=True):
    """torch's CUDA IPC handle of a storage, and where the pool begins in it."""

    device: int
    handle: bytes
    size: int
    offset: int
    ref_handle: bytes
    ref_offset: int
    event_handle: bytes
    event_sync: bool


_handle = msgspec.msgpack.Decoder(_Handle)


class IpcBackend:
    """Copies to and from device memory of another process on this host."""

    lane = "cuda_ipc/memcpy"

    def __init__(self, host: str, regions: Sequence[Region], block_size: int) -> None:
        self._host = host
        self._block_size = block_size
        self._regions = list(regions)
        self._rows = [row for region in regions for row in region.rows]
        self._mapped: dict[str, list[torch.Tensor]] = {}

    def handles(self) -> tuple[bytes, ...]:
        """What peers need to map our pools."""
        storages: list[Any] = [region.tensor.untyped_storage() for region in self._regions]
        return tuple(msgspec.msgpack.encode(_Handle(*storage._share_cuda_())) for storage in storages)

    def reaches(self, peer: AgentRecord) -> bool:
        """True for another process's device memory on this host, in blocks of our size."""
        here = peer.host == self._host and peer.block_size == self._block_size
        return here and bool(peer.ipc) and len(peer.ipc) == len(peer.regions)

    def _map(self, peer: AgentRecord) -> list[torch.Tensor]:
        if peer.epoch not in self._mapped:
            self._mapped[peer.epoch] = [row for n in range(len(peer.ipc)) for row in self._rows_of(peer, n)]
        return self._mapped[peer.epoch]

    def _rows_of(self, peer: AgentRecord, number: int) -> list[torch.Tensor]:
        try:
            parts = _handle.decode(peer.ipc[number])
        except msgspec.DecodeError as error:
            _refuse(peer, error)
        try:
            new: Any = torch.UntypedStorage._new_shared_cuda
            storage = new(*(getattr(parts, name) for name in _Handle.__struct_fields__))
        except RuntimeError as error:
            _refuse(peer, error)
        flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        # A pool starts its storage, so segments lie as far from the first address as in the peer.
        segments = peer.regions[number].segments
        base = min(address for address, _, _ in segments)
        return [
            torch.as_strided(flat, (peer.num_blocks, length), (stride, 1), address - base)
            for address, stride, length in segments
        ]

    def fetch(self, copy: Copy) -> Steps:
        """See ``Backend``."""
        return _copy_rows(copy, self._map(copy.peer), self._rows, False, self.lane)

    def push(self, copy: Copy) -> Steps:
        """See ``Backend``."""
        return _copy_rows(copy, self._rows, self._map(copy.peer), True, self.lane)

    def warm_up(self, copy: Copy) -> Steps:
        """Map the peer's memory."""
        self._map(copy.peer)
        return _nothing()

    def progress(self) -> list[Generator[bool, None, None]]:
        """Nobody asks over this lane."""
        return []

    def close(self) -> None:
        """Unmap."""
        self._mapped.clear()


def _refuse(peer: AgentRecord, error: Exception) -> NoReturn:
    raise TransferError(f"device memory of agent {peer.name} cannot be mapped: {error}") from error
