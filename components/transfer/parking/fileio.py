# SPDX-License-Identifier: Apache-2.0
"""How bytes get from host memory into an open file and back.

``NixlFiles`` uses NIXL's POSIX plugin, on an agent of its own; ``PlainFiles`` uses system calls. Both block and are
called from one thread alone. Errors: ``OSError`` or ``TransferError``. NIXL reports success also for a file that is
too short: callers check sizes before and checksums after.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from components.errors import TransferError
from components.transfer.data.nixl import nixl_is_available

logger = logging.getLogger(__name__)
_PAUSE_S = 50e-6


class FileIO(Protocol):
    """One way of reading and writing files."""

    @property
    def lane(self) -> str:
        """What is reported as the lane."""
        ...

    @contextmanager
    def opened(self, fd: int, size: int) -> Iterator[None]:
        """Context of all calls for one descriptor of a file of ``size`` bytes."""
        ...

    def write(self, fd: int, offset: int, memory: torch.Tensor) -> None:
        """Write all of ``memory``."""
        ...

    def read(self, fd: int, offset: int, memory: torch.Tensor) -> None:
        """Fill ``memory``."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class PlainFiles:
    """pread and pwrite."""

    lane = "file/plain"

    @contextmanager
    def opened(self, fd: int, size: int) -> Iterator[None]:
        """See ``FileIO``."""
        yield

    def write(self, fd: int, offset: int, memory: torch.Tensor) -> None:
        """See ``FileIO``."""
        view = _view(memory)
        while view:
            written = os.pwrite(fd, view, offset)
            view, offset = view[written:], offset + written

    def read(self, fd: int, offset: int, memory: torch.Tensor) -> None:
        """See ``FileIO``."""
        view = _view(memory)
        while view:
            count = os.preadv(fd, [view], offset)
            if not count:
                raise TransferError("the file ends too early")
            view, offset = view[count:], offset + count

    def close(self) -> None:
        """Nothing is held."""


class NixlFiles:
    """NIXL's POSIX plugin (io_uring, libaio or POSIX AIO, as it finds them)."""

    lane = "nixl/posix"

    def __init__(self, name: str, memory: torch.Tensor) -> None:
        from nixl._api import nixl_agent, nixl_agent_config

        self._name = name
        self._agent: Any = nixl_agent(name, nixl_agent_config(enable_prog_thread=False, backends=["POSIX"]))
        self._memory = self._agent.register_memory([memory])
        self._files: dict[int, Any] = {}

    @contextmanager
    def opened(self, fd: int, size: int) -> Iterator[None]:
        """See ``FileIO``."""
        registered = self._agent.register_memory([(0, size, fd, "")], "FILE")
        try:
            yield
        finally:
            self._agent.deregister_memory(registered)

    def write(self, fd: int, offset: int, memory: torch.Tensor) -> None:
        """See ``FileIO``."""
        self._move("WRITE", fd, offset, memory)

    def read(self, fd: int, offset: int, memory: torch.Tensor) -> None:
        """See ``FileIO``."""
        self._move("READ", fd, offset, memory)

    def _move(self, operation: str, fd: int, offset: int, memory: torch.Tensor) -> None:
        size = memory.numel()
        local = self._agent.get_xfer_descs([(memory.data_ptr(), size, 0)], "DRAM")
        file = self._agent.get_xfer_descs([(offset, size, fd)], "FILE")
        try:
            handle = self._agent.initialize_xfer(operation, local, file, self._name, b"")
            try:
                state = self._agent.transfer(handle)
                while state == "PROC":
                    time.sleep(_PAUSE_S)
                    state = self._agent.check_xfer_state(handle)
            finally:
                self._agent.release_xfer_handle(handle)
        except Exception as error:
            raise TransferError(f"NIXL POSIX {operation}: {type(error).__name__}: {error}") from error
        if state != "DONE":
            raise TransferError(f"NIXL POSIX {operation} of {size} bytes at {offset} ended as {state}")

    def close(self) -> None:
        """Deregister the memory."""
        self._agent.deregister_memory(self._memory)
        self._agent = None


def file_io(name: str, memory: torch.Tensor, nixl: bool) -> FileIO:
    """NIXL where it is configured and available; plain calls otherwise."""
    if nixl and nixl_is_available()[0]:
        try:
            return NixlFiles(name, memory)
        except Exception as error:
            logger.warning("NIXL's POSIX plugin cannot be used: %s; files are written with plain calls", error)
    return PlainFiles()


def _view(memory: torch.Tensor) -> memoryview:
    flat: Any = memory.numpy()
    return memoryview(flat)
