# SPDX-License-Identifier: Apache-2.0
"""Passes descriptors of shared host memory between two agents of one host, and maps a peer's memory.

An agent listens on a socket in Linux's abstract namespace, named after its epoch, so that a record can name no file.
It gives read-only descriptors of its pools to processes of the same user (as the kernel reports it) that have passed
the handshake (``components.handshake``); the peer maps them. The connection stays open: its end means that the
agent has gone. Threading: one thread waits on each connection. ``map_peer`` blocks for at most 5 seconds. Errors:
``TransferError``.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import msgspec

from components.acceptor import Acceptor
from components.errors import MigrateError, TransferError
from components.frames import hear, is_open, left, say
from components.handshake import connecting, greet
from components.transfer.data.shared import SharedStorage
from components.transfer.layout import Segment, Span, locate

_MAX_ANSWER = 1 << 20
_FDS_AT_ONCE = 128
_CALL_S = 5.0
_PEER = struct.Struct("3i")


class _Answer(msgspec.Struct, frozen=True):
    storages: tuple[tuple[int, int], ...]
    """Owner's address and bytes of each storage; the descriptors follow in this order."""


def name_of(epoch: str) -> str:
    """Of an agent's socket."""
    # Every user of the host can list these names, and the handshake proves knowledge of the epoch.
    return f"\0dynamo-migrate/{hashlib.sha256(epoch.encode()).hexdigest()[:32]}"


def purpose(epoch: str) -> str:
    """Of the handshake."""
    return f"kv-shm {epoch}"


class Giver:
    """Gives this agent's storages to peers."""

    def __init__(self, epoch: str, storages: Sequence[SharedStorage]) -> None:
        self._storages = list(storages)
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        server.bind(name_of(epoch))
        self._acceptor = Acceptor(server, purpose(epoch), self._serve, "kv-shm")

    def _serve(self, connection: socket.socket) -> None:
        self._give(connection)
        connection.settimeout(None)
        connection.recv(1)  # Until the peer or this agent closes.

    def _give(self, connection: socket.socket) -> None:
        _, user, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        if user != os.geteuid():
            raise TransferError(f"user {user} may not have memory of user {os.geteuid()}")
        say(connection, _Answer(tuple((s.address, s.size) for s in self._storages)), time.monotonic() + _CALL_S)
        for start in range(0, len(self._storages), _FDS_AT_ONCE):
            part = self._storages[start : start + _FDS_AT_ONCE]
            fds: list[int] = []
            with ExitStack() as opened:
                for storage in part:
                    # Opened again for reading: the rights of a descriptor travel with it.
                    fds.append(os.open(f"/proc/self/fd/{storage.fd}", os.O_RDONLY | os.O_CLOEXEC))
                    opened.callback(os.close, fds[-1])
                socket.send_fds(connection, [b"f"], fds)

    def close(self) -> None:
        """Stop; peers see the end of their connections."""
        self._acceptor.close()


class Mapping:
    """A peer's storages, mapped into this process."""

    def __init__(self, name: str, connection: socket.socket, storages: Sequence[tuple[int, int]], mapped: list[int]):
        self.name = name
        self._connection = connection
        known = sorted(zip(storages, mapped, strict=True))
        self._spans = [Span(begin, size) for (begin, size), _ in known]
        self._seen_at = [at for _, at in known]
        self._pieces = [(address, size) for address, (_, size) in zip(mapped, storages, strict=True)]
        self.users = 0

    def seen(self, segment: Segment, blocks: int) -> Segment:
        """The peer's segment at its address here. Raises ``TransferError`` for a block outside the shared memory."""
        found = locate(segment, blocks, self._spans)
        if found is None:
            raise TransferError(f"agent {self.name} names memory outside of what it shares")
        at, offset = found
        return replace(segment, address=self._seen_at[at] + offset)

    def alive(self) -> bool:
        """False once the peer's process or agent has ended."""
        return is_open(self._connection)

    def close(self) -> None:
        """Unmap. The caller guarantees that nobody reads or writes there."""
        self._connection.close()
        for address, size in self._pieces:
            _libc.munmap(address, size)
        self._pieces = []


def map_peer(name: str, epoch: str, end: float) -> Mapping:
    """Request a peer's storages and map them, with page tables filled. Blocks until ``end`` at most."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    fds: list[int] = []
    mapped: list[int] = []
    sizes: list[int] = []
    try:
        end = min(end, time.monotonic() + _CALL_S)
        connection.settimeout(left(end))
        connection.connect(name_of(epoch))
        _, user, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        if user != os.geteuid():
            raise TransferError(f"the process at that address belongs to user {user}")
        greet(connection, connecting(purpose(epoch)), end)
        answer = hear(connection, _Answer, _MAX_ANSWER, end)
        for start in range(0, len(answer.storages), _FDS_AT_ONCE):
            count = min(_FDS_AT_ONCE, len(answer.storages) - start)
            mark, got, _, _ = socket.recv_fds(connection, 1, count)
            fds.extend(got)
            if not mark or len(got) != count:
                raise TransferError("it gave too few descriptors")
        for fd, (_, size) in zip(fds, answer.storages, strict=True):
            mapped.append(_map(fd, size))
            sizes.append(size)
        return Mapping(name, connection, answer.storages, mapped)
    except (OSError, MigrateError) as error:
        connection.close()
        for address, size in zip(mapped, sizes, strict=True):
            _libc.munmap(address, size)
        raise TransferError(f"memory of agent {name} cannot be mapped: {error}") from error
    finally:
        for fd in fds:
            os.close(fd)


_libc: Any = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_FAILED = ctypes.c_void_p(-1).value


def _map(fd: int, size: int) -> int:
    # Python's own mmap would keep a descriptor for each storage of each peer.
    if size < 1 or os.fstat(fd).st_size < size:
        raise TransferError("a descriptor has fewer bytes than were promised")
    flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
    address = _libc.mmap(None, size, mmap.PROT_READ, flags, fd, 0)
    if address == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(address)
