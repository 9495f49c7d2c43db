# SPDX-License-Identifier: Apache-2.0
"""Messages on a connection (a 4-byte length and a body), for threads and for asyncio.

Threads: ``say`` and ``hear`` move a msgspec struct, ``read_into`` bulk bytes; ``end`` is a deadline on
``time.monotonic``. asyncio: ``frame`` makes the bytes of a sealed message (``components.credentials``), ``Frames``
splits received bytes into bodies, ``unframe`` reads one. Both check the length of a body before they allocate it. Only
``Frames`` has state. Raises ``InvalidRequest`` for a malformed or too large body, ``Unauthorized`` for a wrong seal,
``ConnectionResetError`` for an end within a message, ``OSError`` and ``TimeoutError`` as sockets do; the caller then
closes the connection.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from typing import TypeVar

import msgspec

from components import credentials
from components.errors import InvalidRequest, Unauthorized
from components.wire import UNREADABLE

_LENGTH = struct.Struct("!I")


class _Sealed(msgspec.Struct, frozen=True, array_like=True):
    data: bytes
    seal: str = ""


T = TypeVar("T", bound=msgspec.Struct)
_encoder = msgspec.msgpack.Encoder()
_sealed = msgspec.msgpack.Decoder(_Sealed)


def left(end: float) -> float:
    """Seconds until ``end`` on ``time.monotonic``, more than 0 (which makes a socket non-blocking)."""
    return max(0.001, end - time.monotonic())


def say(sock: socket.socket, message: msgspec.Struct, end: float) -> None:
    """Send one message."""
    write_frame(sock, _encoder.encode(message), end)


def hear(sock: socket.socket, kind: type[T], limit: int, end: float | None) -> T:
    """Receive one message of that kind, of at most ``limit`` bytes; without ``end`` it may begin at any time."""
    body = read_frame(sock, limit, end)
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except UNREADABLE as error:
        raise InvalidRequest(f"not a {kind.__name__} message: {error}") from error


def write_frame(sock: socket.socket, data: bytes, end: float) -> None:
    """Send one body."""
    sock.settimeout(left(end))
    sock.sendall(_LENGTH.pack(len(data)) + data)


def read_frame(sock: socket.socket, limit: int, end: float | None) -> bytes:
    """Receive one body of at most ``limit`` bytes; without ``end`` it may begin at any time."""
    (length,) = _LENGTH.unpack(read_exactly(sock, _LENGTH.size, end))
    return read_exactly(sock, _bounded(length, limit), end)


def _bounded(length: int, limit: int) -> int:
    if length > limit:
        raise InvalidRequest(f"a message of {length} bytes; at most {limit}")
    return length


def read_exactly(sock: socket.socket, count: int, end: float | None) -> bytes:
    """Receive ``size`` bytes."""
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
    sock.setblocking(False)
    try:
        return sock.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def frame(message: msgspec.Struct) -> bytes:
    """A sealed message as bytes for the connection."""
    data = _encoder.encode(message)
    body = _encoder.encode(_Sealed(data, credentials.seal(type(message).__name__, data)))
    return _LENGTH.pack(len(body)) + body


def unframe(body: bytes, decoder: msgspec.msgpack.Decoder[T]) -> T:
    """Read a body of ``Frames``."""
    kind = decoder.type.__name__
    try:
        sealed = _sealed.decode(body)
        if not credentials.accepts(kind, sealed.data, sealed.seal):
            raise Unauthorized(f"a {kind} message without the seal of the secret in {credentials.VARIABLE}")
        return decoder.decode(sealed.data)
    except UNREADABLE as error:
        raise InvalidRequest(f"not a {kind} message: {error}") from error


class Frames:
    """Splits bytes into whole bodies. ``limit`` bounds a body and so the buffer."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Bodies completed by these bytes."""
        data, at = self._kept + data, 0
        try:
            while len(data) - at >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(data, at)
                start = at + _LENGTH.size
                if len(data) - start < _bounded(length, self._limit):
                    return
                at = start + length
                yield data[start:at]
        finally:
            self._kept = data[at:]
