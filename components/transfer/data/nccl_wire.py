# SPDX-License-Identifier: Apache-2.0
"""A communicator of two ranks over torch's NCCL binding, as the ``nccl`` lane needs it.

Life cycle: ``connect`` blocks until both ends are connected, on a separate thread, because a set-up with a silent
peer cannot be cancelled in NCCL. ``abort`` ends the communicator with everything in flight, for good.
torch's watchdog, which ends the *process* when a peer dies, is not started: the caller checks for the end of each
operation. Errors: ``TransferError`` with NCCL's or torch's text.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import distributed

from components.errors import TransferError
from components.frames import read_frame, write_frame

_MAX_CTAS = 16
"""Multiprocessors of a GPU that one operation occupies, also while its peer is late."""
_ABORT_S = 5.0
_ID_BYTES = 4096
_SETTINGS = {"TORCH_NCCL_BLOCKING_WAIT": "1", "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING": "0"}
"""The first turns the watchdog off. torch reads both from the environment when it makes a process group."""
_DEFAULTS = {"TORCH_NCCL_BLOCKING_WAIT": "0", "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING": "1"}
_environment = threading.Lock()


class Flight(Protocol):
    """An operation in flight."""

    def done(self) -> bool:
        """True once it has ended. Raises ``TransferError`` when it failed."""
        ...


class Wire(Protocol):
    """Two ends that send and receive in one order. ``abort`` may come from any thread."""

    def send(self, data: torch.Tensor) -> Flight:
        """Begin to send, behind the work of the current stream."""
        ...

    def receive(self, into: torch.Tensor) -> Flight:
        """Begin to receive as many bytes, behind the work of the current stream."""
        ...

    def abort(self) -> bool:
        """End everything. False when it did not end in time: the buffers may still be written to."""
        ...


Connect = Callable[[socket.socket, int, torch.device, float], Wire]
"""Arguments: a socket to the peer, rank (0 or 1), device of the tensors, deadline on ``time.monotonic``."""


def nccl_is_available() -> tuple[bool, str]:
    """(True, "") when this build of torch has NCCL and there is a GPU, else (False, why not)."""
    if not distributed.is_available() or not distributed.is_nccl_available():
        return False, f"torch {torch.__version__} was built without NCCL: install a CUDA build"
    if not torch.cuda.is_available():
        return False, "NCCL needs an NVIDIA GPU, and CUDA finds none"
    return True, ""


def nccl_version() -> str:
    """torch's version of NCCL, which must be equal at both ends."""
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]


def prepare_environment() -> None:
    """Create torch's variables at start: later changes of their values then move no memory that other threads read."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)


class _IdStore(distributed.Store):  # type: ignore[misc,name-defined]
    """Carries the communicator's id from rank 0 to rank 1 over their socket."""

    def __init__(self, sock: socket.socket, end: float) -> None:
        super().__init__()
        self._sock = sock
        self._end = end

    def set(self, key: str, value: Any) -> None:
        write_frame(self._sock, value if isinstance(value, bytes) else value.encode(), self._end)

    def get(self, key: str) -> bytes:
        return read_frame(self._sock, _ID_BYTES, self._end)


class _Work:
    """torch's handle of an operation."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def done(self) -> bool:
        if not self._work.is_completed():
            return False
        try:
            self._work.wait()  # The operation has ended: this only raises its error.
        except RuntimeError as error:
            raise TransferError(f"NCCL: {_first_line(error)}") from error
        return True


class NcclWire:
    """See the module docstring. Made by ``connect``."""

    def __init__(self, sock: socket.socket, rank: int, device: torch.device, end: float) -> None:
        self._peer = 1 - rank
        self._store = _IdStore(sock, end)
        group: Any = getattr(distributed, "ProcessGroupNCCL")  # noqa: B009  CPU builds have none
        options = group.Options(is_high_priority_stream=True)
        options._timeout = timedelta(seconds=max(1.0, end - time.monotonic()))
        options.config.max_ctas = _MAX_CTAS
        with _environment:
            before = {name: os.environ.get(name, value) for name, value in _DEFAULTS.items()}
            os.environ.update(_SETTINGS)
            try:
                self._group = group(self._store, rank, 2, options)
            finally:
                os.environ.update(before)
        self._group.eager_connect_single_device(device)
        self._lock = threading.Lock()
        self._aborted: threading.Thread | None = None

    def send(self, data: torch.Tensor) -> Flight:
        """See ``Wire``."""
        return self._begin(self._group.send, data)

    def receive(self, into: torch.Tensor) -> Flight:
        """See ``Wire``."""
        return self._begin(self._group.recv, into)

    def _begin(self, operation: Callable[..., Any], data: torch.Tensor) -> Flight:
        try:
            return _Work(operation([data], self._peer, 0))
        except RuntimeError as error:
            raise TransferError(f"NCCL: {_first_line(error)}") from error

    def abort(self) -> bool:
        """See ``Wire``."""
        # On a thread: it waits for NCCL's threads, possibly without end.
        with self._lock:
            if self._aborted is None:
                self._aborted = threading.Thread(target=self._group.abort, name="kv-nccl-abort", daemon=True)
                self._aborted.start()
        self._aborted.join(_ABORT_S)
        return not self._aborted.is_alive()


def connect(sock: socket.socket, rank: int, device: torch.device, end: float) -> Wire:
    """A communicator after its first bytes in both directions, with which NCCL connects."""
    try:
        wire = NcclWire(sock, rank, device, end)
    except (RuntimeError, OSError, ValueError) as error:
        raise TransferError(f"NCCL: {_first_line(error)}") from error
    try:
        token = torch.full((1,), rank, dtype=torch.uint8, device=device)
        ways = (wire.send, wire.receive) if rank == 0 else (wire.receive, wire.send)
        for way in ways:
            flight = way(token)
            while not flight.done():
                if time.monotonic() > end:
                    raise TransferError("NCCL: the peer did not connect in time")
                time.sleep(1e-3)
        return wire
    except TransferError:
        wire.abort()
        raise


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:300] or type(error).__name__
