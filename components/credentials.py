# SPDX-License-Identifier: Apache-2.0
"""The secret that router, workers, planner and command line share, when one is configured.

``DYN_MIGRATE_SECRET_FILE`` names a file; its contents (16 bytes or more) seal every message of the control surface and
of the token streams, and prove both ends of every connection of ours (``components.handshake``). A process with the
secret takes no message without its seal, so that whoever can only reach a port can neither migrate, drain, read status,
feed a stream nor read KV blocks. The seal does not hide anything and does not stop somebody who can record messages
from sending one again: for that, encrypt the network. Read once; no threads. Raises ``ConfigError``.
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
    """The secret, or nothing when none is configured."""
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
    """Over the parts and where each ends. Without a secret it shows no more than that both sides mean the same."""
    return hmac.digest(secret(), b"".join(len(part).to_bytes(4, "big") + part for part in parts), "sha256")


def token(kind: str) -> str:
    """One that follows from the secret and says nothing of it: ``printf KIND | openssl dgst -sha256 -hmac SECRET``."""
    return hmac.digest(secret(), kind.encode(), "sha256").hex()


def seal(kind: str, data: bytes) -> str:
    """Of a message; empty without a secret. ``kind`` keeps an answer from being sent as a call."""
    key = secret()
    return hmac.digest(key, kind.encode() + b"\0" + data, "sha256").hex() if key else ""


def accepts(kind: str, data: bytes, given: object) -> bool:
    """True for the right seal, and always without a secret."""
    expected = seal(kind, data)
    return not expected or (isinstance(given, str) and hmac.compare_digest(expected.encode(), given.encode()))
