# SPDX-License-Identifier: Apache-2.0
"""Blocks between device memory of two processes of one host, over CUDA IPC: one kernel for scattered blocks too.

Life cycle: the first ``reaches`` for a peer maps each of its storages once. Where that fails (another container, no
peer access between the GPUs) the reason is logged and the pair uses its next lane, until a later attempt succeeds.
Memory is mapped on the local device, so the peer's device need not be visible to this process.
Threading: worker thread; the kernel is queued on a separate stream and polled. A transfer that fails while its
kernel runs waits for it; after its grace it marks its blocks as unsafe until the kernel has ended.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from components.errors import MigrateError, TransferError
from components.transfer import profiling
from components.transfer.config import KVPool, TransferResult
from components.transfer.control.record import AgentRecord
from components.transfer.data import kernels
from components.transfer.data.base import Backend, Copy, Steps
from components.transfer.layout import Span, locate
from components.transfer.shares import Share, Shares
from components.wire import UNREADABLE

logger = logging.getLogger(__name__)

_PROCESS = uuid.uuid4().hex
"""CUDA cannot map memory of the same process."""
_AGAIN_S = 1.0
_AGAIN_MOST_S = 60.0
_TRIES = 10


class _Handle(msgspec.Struct, frozen=True, array_like=True):
    """torch's CUDA IPC handle of a storage, and its address at the owner."""

    device: int
    handle: bytes
    size: int
    offset: int
    ref_handle: bytes
    ref_offset: int
    event_handle: bytes
    event_sync: bool
    process: str
    address: int


_handle = msgspec.msgpack.Decoder(_Handle)


class _SameProcess(Exception):
    """The peer's memory is this process's own: its blocks go over ``local``."""


class _Again:
    """Time of the next attempt to map a peer: the obstacle may have gone without any other sign."""

    def __init__(self, peer: AgentRecord) -> None:
        self.peer = peer
        self.tries = 0
        self.due = 0.0

    def put_off(self) -> None:
        """The next attempt, after twice the wait."""
        self.due = time.monotonic() + min(_AGAIN_S * 2**self.tries, _AGAIN_MOST_S)
        self.tries += 1


@dataclass(frozen=True)
class _Mapped:
    """A peer's memory, mapped on the local device, and the kernel that copies from it."""

    fetch: kernels.Mover
    rows: Sequence[torch.Tensor]
    """Keeps the memory mapped while a kernel runs."""
    block_bytes: int


class _Flight:
    """Resources of one running kernel: an event for its end, and pinned memory for its block list."""

    def __init__(self, pairs: int) -> None:
        self.pairs = pairs
        self.event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.index = torch.empty(2 * pairs, dtype=torch.int64, pin_memory=True)

    def ended(self) -> bool:
        """True once the kernel has ended."""
        return bool(self.event.query())  # type: ignore[no-untyped-call]


class IpcBackend(Backend):
    """See the module docstring."""

    lane = "cuda_ipc/kernel"
    inline = True

    def __init__(self, host: str, shares: Shares, pools: Sequence[KVPool]) -> None:
        """Raise ``RuntimeError`` where memory cannot be shared."""
        self._host = host
        self._shares = shares
        self._blocks = pools[0].num_blocks
        self._device = pools[0].tensor.device
        storages = {storage.data_ptr(): storage for storage in (pool.tensor.untyped_storage() for pool in pools)}
        self.handles = tuple(_shared(storage) for storage in storages.values())
        """Handles with which peers map the local storages."""
        # Of high priority, and not behind the engine's steps in the default stream.
        self._stream = torch.cuda.Stream(self._device, priority=-1)  # type: ignore[no-untyped-call]
        self._peers: dict[str, _Mapped | None] = {}
        self._unmapped: dict[str, _Again] = {}
        self._idle: list[_Flight] = []
        """Free ones, for reuse: making one takes as long as a launch."""
        self._lingering: list[tuple[_Flight, Callable[[], None], _Mapped]] = []

    def reaches(self, peer: AgentRecord) -> bool:
        """True when the peer's device memory is mapped here."""
        if peer.host != self._host or not peer.ipc:
            return False
        return self._map(peer) is not None

    def _map(self, peer: AgentRecord) -> _Mapped | None:
        if peer.key not in self._peers:
            for key in [k for k in self._peers if k.startswith(f"{peer.name}/")]:
                del self._peers[key]
                self._unmapped.pop(key, None)
            self._peers[peer.key] = self._try(peer)
        return self._peers[peer.key]

    def _try(self, peer: AgentRecord) -> _Mapped | None:
        try:
            mapped = self._new_mapping(peer)
        except _SameProcess:
            return None
        except Exception as error:  # Triton raises whatever its compiler raises.
            again = self._unmapped.setdefault(peer.key, _Again(peer))
            say = logger.debug if again.tries else logger.warning
            say("device memory of agent %s is not mapped, another lane moves its blocks: %s", peer.name, error)
            if again.tries == _TRIES:
                del self._unmapped[peer.key]
            again.put_off()
            return None
        if self._unmapped.pop(peer.key, None) is not None:
            logger.info("device memory of agent %s is mapped now", peer.name)
        return mapped

    def _new_mapping(self, peer: AgentRecord) -> _Mapped:
        share = self._shares.taken(peer)
        rows = self._rows_of(peer, share)
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            return _Mapped(kernels.mover(rows, share.rows), rows, share.block_bytes)

    def _rows_of(self, peer: AgentRecord, share: Share) -> list[torch.Tensor]:
        try:
            handles = sorted((_handle.decode(each) for each in peer.ipc), key=lambda handle: handle.address)
        except UNREADABLE as error:
            raise TransferError(f"its record is malformed: {error}") from error
        if any(handle.process == _PROCESS for handle in handles):
            raise _SameProcess
        whole = [self._open(handle) for handle in handles]
        spans = [Span(handle.address, flat.numel()) for handle, flat in zip(handles, whole, strict=True)]
        rows = []
        for segment in share.remote:
            found = locate(segment, peer.num_blocks, spans)
            if found is None:
                raise TransferError("it names memory outside of what it shares")
            at, offset = found
            shape = (peer.num_blocks, segment.length)
            rows.append(torch.as_strided(whole[at], shape, (segment.stride, 1), offset))
        return rows

    def _open(self, handle: _Handle) -> torch.Tensor:
        new: Any = torch.UntypedStorage._new_shared_cuda
        values = [getattr(handle, name) for name in _Handle.__struct_fields__]
        storage = new(self._device.index, *values[1:8])
        flat: torch.Tensor = torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)
        return flat

    def fetch(self, copy: Copy) -> Steps:
        """See ``Backend``."""
        mapped = self._map(copy.peer)
        if mapped is None:
            raise TransferError(f"device memory of agent {copy.peer.name} is not mapped")
        begun = time.perf_counter()
        size = len(copy.local) * mapped.block_bytes
        mark = profiling.begin("wire", size)
        with profiling.span("post", size):
            flight = self._launch(mapped, copy)
        queued = time.perf_counter()
        try:
            yield from self._ended(flight, copy, mapped)
        finally:
            profiling.end(mark)
        self._idle.append(flight)
        return TransferResult(
            size,
            len(mapped.rows) * len(copy.local),
            post_s=queued - begun,
            wire_s=time.perf_counter() - queued,
            lane=self.lane,
        )

    def _launch(self, mapped: _Mapped, copy: Copy) -> _Flight:
        flight = self._flight(len(copy.local))
        with torch.cuda.device(self._device.index):
            mapped.fetch(copy.remote, copy.local, flight.index, self._stream)
            flight.event.record(self._stream)
        return flight

    def _flight(self, pairs: int) -> _Flight:
        # Several callers may start transfers at once.
        with suppress(IndexError):
            flight = self._idle.pop()
            if flight.pairs >= pairs:
                return flight
        return _Flight(max(pairs, self._blocks))

    def _ended(self, flight: _Flight, copy: Copy, mapped: _Mapped) -> Generator[bool, None, None]:
        try:
            yield True
            while not flight.ended():
                yield False
        except MigrateError:
            yield from self._ended(flight, copy, mapped)
            raise
        except GeneratorExit:
            self._lingering.append((flight, copy.mark_unsafe(), mapped))
            raise

    def warm_up(self, copy: Copy) -> Steps:
        """Map the peer's memory and compile the kernels."""
        begun = time.perf_counter()
        yield from self.fetch(copy)
        return TransferResult(wire_s=time.perf_counter() - begun, lane=self.lane)

    def progress(self) -> list[Generator[bool, None, None]]:
        """No peer requests over this lane. Finishes abandoned transfers and retries unmapped peers."""
        for item in list(self._lingering):
            flight, safe, _ = item
            if flight.ended():
                self._lingering.remove(item)
                self._idle.append(flight)
                safe()
        now = time.monotonic()
        for key, again in list(self._unmapped.items()):
            if again.due <= now:
                self._peers[key] = self._try(again.peer)
        return []

    def close(self) -> None:
        """Wait for running kernels, then unmap."""
        self._stream.synchronize()
        self._peers.clear()
        self._unmapped.clear()


def _shared(storage: torch.UntypedStorage) -> bytes:
    parts: tuple[Any, ...] = storage._share_cuda_()  # type: ignore[no-untyped-call]
    return msgspec.msgpack.encode((*parts, _PROCESS, storage.data_ptr()))
