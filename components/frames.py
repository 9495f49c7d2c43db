# SPDX-License-Identifier: Apache-2.0
"""Messages on a plain connection: a 4-byte length and a sealed msgspec struct.

``frame`` and ``unframe`` are ``messages.pack`` and ``unpack`` for bytes; ``Frames`` cuts what arrives. Pure.
Raises ``InvalidRequest`` on anything malformed or too large, ``Unauthorized``; the caller closes the connection.
"""

from __future__ import annotations

import struct
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


def frame(message: msgspec.Struct) -> bytes:
    """A message as it goes over the connection."""
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
                if length > self._limit:
                    raise InvalidRequest(f"a message of {length} bytes; at most {self._limit}")
                start = at + _LENGTH.size
                if len(data) - start < length:
                    return
                at = start + length
                yield data[start:at]
        finally:
            self._kept = data[at:]
