# SPDX-License-Identifier: Apache-2.0
"""Messages on a connection: a 4-byte length and a body, for sockets that threads read and for asyncio.

Threads: ``say`` and ``hear`` move a msgspec struct, ``read_into`` bulk bytes; ``end`` is a deadline on
``time.monotonic``. asyncio: ``frame`` gives a sealed message (``components.credentials``) as bytes, ``Frames`` cuts
what arrives into bodies, ``unframe`` reads one. Both bound a body before they allocate it. No state but that of
``Frames``. Raises ``InvalidRequest`` for what is malformed or too large, ``Unauthorized`` for a wrong seal,
``ConnectionResetError`` for a connection that ends within a message, ``OSError`` and ``TimeoutError`` as sockets do;
the caller closes it then.
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
    """Seconds until then on ``time.monotonic``, never none: a socket takes 0 as a wish not to wait."""
    return max(0.001, end - time.monotonic())


def say(sock: socket.socket, message: msgspec.Struct, end: float) -> None:
    """Send one message."""
    write_frame(sock, _encoder.encode(message), end)


def hear(sock: socket.socket, kind: type[T], limit: int, end: float | None) -> T:
    """Receive one message of that kind, of ``limit`` bytes at most; without ``end``, whenever it begins."""
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
    """Receive one body of ``limit`` bytes at most; without ``end``, whenever it begins."""
    (length,) = _LENGTH.unpack(read_exactly(sock, _LENGTH.size, end))
    return read_exactly(sock, _bounded(length, limit), end)


def _bounded(length: int, limit: int) -> int:
    if length > limit:
        raise InvalidRequest(f"a message of {length} bytes; at most {limit}")
    return length


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
            raise ConnectionResetError("the connection was closed in the middle of a message")
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


def frame(message: msgspec.Struct) -> bytes:
    """A sealed message as it goes over the connection."""
    data = _encoder.encode(message)
    body = _encoder.encode(_Sealed(data, credentials.seal(type(message).__name__, data)))
    return _LENGTH.pack(len(body)) + body


def unframe(body: bytes, decoder: msgspec.msgpack.Decoder[T]) -> T:
    """Read what ``Frames`` has cut out."""
    kind = decoder.type.__name__
    try:
        sealed = _sealed.decode(body)
        if not credentials.accepts(kind, sealed.data, sealed.seal):
            raise Unauthorized(f"a {kind} message without the seal of the secret in {credentials.VARIABLE}")
        return decoder.decode(sealed.data)
    except UNREADABLE as error:
        raise InvalidRequest(f"not a {kind} message: {error}") from error


class Frames:
    """Bytes in, whole bodies out. ``limit`` bounds a body, and so what is kept of one that is not whole."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Bodies that are whole with these bytes."""
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
