# SPDX-License-Identifier: Apache-2.0
"""Messages on a connection: a 4-byte length and a body.

``say`` and ``hear`` move a msgspec struct over a socket, ``encoded`` and ``heard`` over streams of asyncio,
``read_into`` bulk bytes; ``end`` is a deadline on ``time.monotonic``. The length of a body is checked before it is
allocated. No state. Raises ``InvalidRequest`` for a malformed or too large
body, ``ConnectionResetError`` for an end within a message, ``OSError`` and ``TimeoutError`` as sockets do; the caller
then closes the connection.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from typing import TypeVar

import msgspec

from components.errors import InvalidRequest
from components.wire import UNREADABLE

_LENGTH = struct.Struct("!I")


T = TypeVar("T", bound=msgspec.Struct)
_encoder = msgspec.msgpack.Encoder()


def left(end: float) -> float:
    """Seconds until ``end`` on ``time.monotonic``; never 0, which would make a socket non-blocking."""
    return max(0.001, end - time.monotonic())


def say(sock: socket.socket, message: msgspec.Struct, end: float) -> None:
    """Send one message."""
    sock.settimeout(left(end))
    sock.sendall(framed(_encoder.encode(message)))


def hear(sock: socket.socket, kind: type[T], limit: int, end: float | None) -> T:
    """Receive one message of that kind, of at most ``limit`` bytes; without ``end`` it may begin at any time."""
    length = _length(read_exactly(sock, _LENGTH.size, end), limit)
    return _decoded(read_exactly(sock, length, end), kind)


async def heard(reader: asyncio.StreamReader, kind: type[T], limit: int) -> T:
    """``hear`` for a stream, without a deadline. Raises ``EOFError`` at its end."""
    length = _length(await reader.readexactly(_LENGTH.size), limit)
    return _decoded(await reader.readexactly(length), kind)


def encoded(message: msgspec.Struct, limit: int) -> bytes:
    """One message as it goes over the connection. Raises ``InvalidRequest`` for one of more than ``limit`` bytes."""
    data = _encoder.encode(message)
    return _LENGTH.pack(_within(len(data), limit)) + data


def _decoded(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except UNREADABLE as error:
        raise InvalidRequest(f"not a {kind.__name__} message: {error}") from error


def _length(head: bytes, limit: int) -> int:
    return _within(int.from_bytes(head), limit)


def _within(length: int, limit: int) -> int:
    if length > limit:
        raise InvalidRequest(f"a message of {length} bytes; at most {limit}")
    return length


def framed(data: bytes) -> bytes:
    """One body as it goes over the connection."""
    return _LENGTH.pack(len(data)) + data


def read_exactly(sock: socket.socket, count: int, end: float | None) -> bytes:
    """Receive ``count`` bytes."""
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
            raise ConnectionResetError("the connection was closed in the middle of a message")
        done += got


def is_open(sock: socket.socket) -> bool:
    """False after the peer has closed it or ended."""
    try:
        sock.setblocking(False)
        return sock.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False
