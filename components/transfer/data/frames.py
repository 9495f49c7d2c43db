# SPDX-License-Identifier: Apache-2.0
"""Messages of bounded length over a socket, with a deadline: a 4-byte length, then the bytes.

Raises ``TransferError`` for what is too long or cut off, ``TimeoutError`` and ``OSError`` as sockets do.
"""

from __future__ import annotations

import socket
import struct
import time

from components.errors import TransferError

_LENGTH = struct.Struct("!I")


def left(end: float) -> float:
    """Seconds until then on ``time.monotonic``, never none: a socket takes 0 as a wish not to wait."""
    return max(0.001, end - time.monotonic())


def write_frame(sock: socket.socket, data: bytes, end: float) -> None:
    """Send one message."""
    sock.settimeout(left(end))
    sock.sendall(_LENGTH.pack(len(data)) + data)


def read_frame(sock: socket.socket, limit: int, end: float | None) -> bytes:
    """Receive one message of ``limit`` bytes at most; without ``end``, whenever it begins."""
    (length,) = _LENGTH.unpack(read_exactly(sock, _LENGTH.size, end))
    if length > limit:
        raise TransferError(f"a message of {length} bytes is longer than {limit}")
    return read_exactly(sock, length, end)


def read_exactly(sock: socket.socket, count: int, end: float | None) -> bytes:
    """Receive so many bytes."""
    data = bytearray(count)
    read_into(sock, memoryview(data), end)
    return bytes(data)


def read_into(sock: socket.socket, view: memoryview, end: float | None) -> None:
    """Fill the view."""
    done = 0
    while done < len(view):
        sock.settimeout(None if end is None else left(end))
        got = sock.recv_into(view[done:])
        if not got:
            raise TransferError("the connection was closed in the middle of a message")
        done += got


def is_open(sock: socket.socket) -> bool:
    """False once the peer has closed it or its process has ended."""
    sock.setblocking(False)
    try:
        return sock.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False
