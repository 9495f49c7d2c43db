# SPDX-License-Identifier: Apache-2.0
"""Parked KV in files: blocks go through a few host buffers, so that copying and the disk overlap.

Threading: the worker steps the transfers; everything that waits for the disk runs on one other thread, in order. A
failed transfer leaves its file to that thread, which removes it after the last write. The disk never touches the
engine's blocks; copies between buffers and blocks do, and the transfer waits for those.
Errors: see ``folder.py``.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import ParamSpec, Protocol, TypeVar

import torch

from components.transfer import profiling
from components.transfer.parking.fileio import FileIO, file_io
from components.transfer.parking.folder import Folder
from components.transfer.parking.loading import Chunks, Finish, Loader, Steps, host_memory
from components.transfer.parking.ticket import Ticket, require_id, require_same

logger = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")
_SLOTS = 4


class _Pending(Protocol):
    def ready(self) -> bool: ...

    def wait(self) -> None: ...


@dataclass(frozen=True)
class _Job:
    """One read or write on the disk's thread."""

    future: Future[None]

    def ready(self) -> bool:
        """True once it has succeeded; raises its error."""
        if not self.future.done():
            return False
        self.future.result()
        return True

    def wait(self) -> None:
        """Nothing to wait for: buffer and file are released on the same thread, after it."""


@dataclass
class _File:
    """The file of one transfer. From the begin of the transfer it belongs to the disk's thread."""

    name: str
    fd: int = -1
    held: ExitStack = field(default_factory=ExitStack)


class FileShelf:
    """See the module docstring."""

    def __init__(self, loader: Loader, folder: Folder, name: str, nixl: bool) -> None:
        self._loader = loader
        self._folder = folder
        self._buffer = host_memory(_SLOTS * loader.chunk_bytes, loader.pinned)
        self._io: FileIO = file_io(f"{name}/files", self._buffer, nixl)
        self.lane = self._io.lane
        self._free = deque(range(_SLOTS))
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="kv-park")

    @property
    def used_bytes(self) -> int:
        """Bytes of the folder, of all agents."""
        return self._folder.used_bytes()

    def tickets(self) -> list[Ticket]:
        """Tickets of all complete files in the folder; reads them on the caller's thread."""
        return self._folder.tickets()

    def put(self, name: str, index: torch.Tensor, chunks: Chunks, done: Callable[[int], None], end: Finish) -> Steps:
        """Copy blocks into a new file."""
        file, complete = _File(name), False
        slots: list[int] = []
        try:
            yield from self._wait(self._create, file, len(index) * self._loader.block_bytes)
            yield from self._take(slots)

            def gather(number: int, memory: torch.Tensor) -> _Pending:
                return self._loader.unload(index[slice(*chunks[number])], memory)

            def write(number: int, memory: torch.Tensor) -> _Pending:
                return self._queue(self._io.write, file, number * self._loader.chunk_bytes, memory)

            yield from self._pipeline(chunks, slots, gather, write, done)
            yield from self._wait(self._folder.commit, name, file.fd, end())
            complete = True
        finally:
            self._disk.submit(self._let_go, file, slots, not complete)

    def get(self, ticket: Ticket, index: torch.Tensor, chunks: Chunks, done: Callable[[int], None]) -> Steps:
        """Copy a file's blocks back."""
        file = _File(require_id(ticket))
        slots: list[int] = []
        size = ticket.chunk_blocks * ticket.block_bytes
        try:
            yield from self._wait(self._open, file, ticket)
            yield from self._take(slots)

            def read(number: int, memory: torch.Tensor) -> _Pending:
                return self._queue(self._io.read, file, number * size, memory)

            def scatter(number: int, memory: torch.Tensor) -> _Pending:
                return self._loader.load(index[slice(*chunks[number])], memory)

            yield from self._pipeline(chunks, slots, read, scatter, done)
        finally:
            self._disk.submit(self._let_go, file, slots, False)

    def drop(self, ticket: Ticket) -> Generator[bool, None, bool]:
        """Remove a file. False when there is none."""
        return (yield from self._wait(self._folder.remove, require_id(ticket)))

    def _queue(
        self, work: Callable[[int, int, torch.Tensor], None], file: _File, offset: int, memory: torch.Tensor
    ) -> _Job:
        def run() -> None:
            # Reserved room may be gone: thin volumes, quotas of network file systems.
            with self._folder.errors(file.name), profiling.span("disk", memory.numel()):
                work(file.fd, offset, memory)

        return _Job(self._disk.submit(run))

    def _pipeline(
        self,
        chunks: Chunks,
        slots: Sequence[int],
        first: Callable[[int, torch.Tensor], _Pending],
        second: Callable[[int, torch.Tensor], _Pending],
        done: Callable[[int], None],
    ) -> Steps:
        free, number = deque(slots), 0
        stages: tuple[deque[tuple[int, int, _Pending]], ...] = (deque(), deque())
        try:
            while number < len(chunks) or stages[0] or stages[1]:
                worked = False
                if free and number < len(chunks):
                    slot = free.popleft()
                    stages[0].append((number, slot, first(number, self._memory(slot, chunks[number]))))
                    number, worked = number + 1, True
                if stages[0] and stages[0][0][2].ready():
                    at, slot, _ = stages[0].popleft()
                    stages[1].append((at, slot, second(at, self._memory(slot, chunks[at]))))
                    worked = True
                if stages[1] and stages[1][0][2].ready():
                    at, slot, _ = stages[1].popleft()
                    free.append(slot)
                    done(at)
                    worked = True
                yield worked
        finally:
            # Copies from and to the engine's blocks take some milliseconds at most.
            for _, _, pending in (*stages[0], *stages[1]):
                pending.wait()

    def _memory(self, slot: int, chunk: tuple[int, int]) -> torch.Tensor:
        start = slot * self._loader.chunk_bytes
        return self._buffer[start : start + (chunk[1] - chunk[0]) * self._loader.block_bytes]

    def _take(self, slots: list[int]) -> Steps:
        """Two buffers, or one when others use the rest."""
        while not self._free:
            yield False
        while self._free and len(slots) < 2:
            slots.append(self._free.popleft())

    def _wait(self, work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> Generator[bool, None, T]:
        future = self._disk.submit(work, *arguments, **named)
        while not future.done():
            yield False
        return future.result()

    def _create(self, file: _File, size: int) -> None:
        file.fd = self._folder.create(file.name, size)
        file.held.callback(os.close, file.fd)
        file.held.enter_context(self._io.opened(file.fd, max(1, size)))

    def _open(self, file: _File, ticket: Ticket) -> None:
        file.fd, found = file.held.enter_context(self._folder.opened(file.name))
        require_same(found, ticket)
        file.held.enter_context(self._io.opened(file.fd, max(1, ticket.total_bytes)))

    def _let_go(self, file: _File, slots: list[int], remove: bool) -> None:
        try:
            file.held.close()
            if remove:
                self._folder.remove(file.name)
        except Exception:
            logger.exception("parked file %s", file.name)
        finally:
            self._free.extend(slots)

    def close(self) -> None:
        """End the disk's thread after its queued work."""
        self._disk.shutdown(wait=True)
        self._io.close()
        self._folder.close()
