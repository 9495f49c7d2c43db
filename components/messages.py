# SPDX-License-Identifier: Apache-2.0
"""Packs this package's messages for Dynamo's endpoints; see ``components.migration.messages``.

Dynamo carries JSON-like values. Each message is one msgspec struct, as base64 msgpack under ``m``, so that one place
checks bytes, ids and unknown fields. Messages larger than ``MAX_BYTES`` are not decoded. With a shared secret
(``components.credentials``) each message also has its seal under ``s``.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any, TypeVar

import msgspec

from components import credentials
from components.errors import InvalidRequest, Unauthorized
from components.wire import UNREADABLE

MAX_BYTES = 64 << 20


T = TypeVar("T", bound=msgspec.Struct)


def pack(message: msgspec.Struct) -> dict[str, str]:
    """A message for Dynamo. Raises ``ConfigError`` when the secret is unreadable."""
    data = msgspec.msgpack.encode(message)
    sealed = credentials.seal(type(message).__name__, data)
    return {"m": base64.b64encode(data).decode()} | ({"s": sealed} if sealed else {})


def unpack(payload: Any, kind: type[T]) -> T:
    """Read a message. Raises ``InvalidRequest`` when it is malformed or too large, ``Unauthorized``."""
    text = payload.get("m") if isinstance(payload, dict) else None
    if not isinstance(text, str) or len(text) > MAX_BYTES:
        raise InvalidRequest(f"not a {kind.__name__} message")
    try:
        data = base64.b64decode(text, validate=True)
        if not credentials.accepts(kind.__name__, data, payload.get("s")):
            raise Unauthorized(f"a {kind.__name__} message without the seal of the secret in {credentials.VARIABLE}")
        return msgspec.msgpack.decode(data, type=kind)
    except (binascii.Error, *UNREADABLE) as error:
        raise InvalidRequest(f"not a {kind.__name__} message: {error}") from error
