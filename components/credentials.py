# SPDX-License-Identifier: Apache-2.0
"""The optional secret that workers, planner, page and command line share.

``DYN_MIGRATE_SECRET_FILE`` names a file. Its contents (16 bytes or more) seal every message of the control surface
and of token streams, and prove both ends of every connection of this package (``components.handshake``). A process
with the secret refuses messages without seal: access to a port alone allows neither migrate, drain, status, feeding a
stream nor reading KV blocks. The seal does not encrypt and does not prevent replay of recorded messages: encrypt the
network against that. Read once; no threads. Raises ``ConfigError``.
"""

from __future__ import annotations

import hmac
from functools import cache
from pathlib import Path

from components import env
from components.errors import ConfigError

VARIABLE = env.SECRET_FILE.name
_SHORTEST = 16


@cache
def secret() -> bytes:
    """The secret; empty: none."""
    path = env.SECRET_FILE.read()
    if not path:
        return b""
    try:
        found = Path(path).read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"{VARIABLE} names {path}: {error.strerror}") from error
    if len(found) < _SHORTEST:
        raise ConfigError(f"{VARIABLE} names {path}: a secret has at least {_SHORTEST} bytes; openssl rand -hex 32")
    return found


def mac(*parts: bytes) -> bytes:
    """An HMAC over the parts and their lengths. Without a secret it proves only that both sides have equal parts."""
    return hmac.digest(secret(), b"".join(len(part).to_bytes(4, "big") + part for part in parts), "sha256")


def token(kind: str) -> str:
    """A token derived from the secret: ``printf KIND | openssl dgst -sha256 -hmac SECRET``."""
    return hmac.digest(secret(), kind.encode(), "sha256").hex()


def seal(kind: str, data: bytes) -> str:
    """The seal of a message; empty without a secret. ``kind`` distinguishes calls from answers."""
    key = secret()
    return hmac.digest(key, kind.encode() + b"\0" + data, "sha256").hex() if key else ""


def accepts(kind: str, data: bytes, given: object) -> bool:
    """True for the right seal; always True without a secret."""
    expected = seal(kind, data)
    return not expected or (isinstance(given, str) and hmac.compare_digest(expected.encode(), given.encode()))
