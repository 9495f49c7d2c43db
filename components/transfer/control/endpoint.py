# SPDX-License-Identifier: Apache-2.0
"""Addresses of servers as users write them: parsed, resolved, and told without their secrets.

``resolve`` runs on an asyncio loop and looks names up anew each time: a server that comes back may have moved.
Errors: ``ConfigError`` for an address that cannot be read, ``MigrateError`` for a name that is not found.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from components.address import parts_of
from components.errors import ConfigError, MigrateError

_ETCD_PORT = 2379


@dataclass(frozen=True)
class Endpoint:
    """One server."""

    host: str
    port: int
    secure: bool

    @classmethod
    def of(cls, url: str) -> Endpoint:
        """From ``https://host:2379`` or ``host:2379``."""
        try:
            parts = parts_of(url)
            host, port = parts.hostname, parts.port or _ETCD_PORT
        except ValueError as error:
            raise ConfigError(f"etcd_endpoints {without_secrets(url)!r}: {error}") from error
        if not host or parts.scheme not in ("", "http", "https"):
            raise ConfigError(f"etcd_endpoints {without_secrets(url)!r}: write http://host:2379 or https://host:2379")
        return cls(host, port, parts.scheme == "https")


async def resolve(endpoints: Sequence[Endpoint]) -> list[str]:
    """IPv4 addresses with ports, what the etcd client takes."""
    found: list[str] = []
    loop = asyncio.get_running_loop()
    trouble = ""
    for each in endpoints:
        try:
            answers = await loop.getaddrinfo(each.host, each.port, family=socket.AF_INET, type=socket.SOCK_STREAM)
        except OSError as error:
            trouble = f"{each.host}: {error.strerror or error}"
            continue
        found.extend(f"{address[0]!s}:{each.port}" for *_, address in answers)
    if not found:
        raise MigrateError(f"no IPv4 address of {trouble}")
    return list(dict.fromkeys(found))


def without_secrets(url: str) -> str:
    """The address without user, password or token."""
    before, mark, after = url.rpartition("@")
    scheme, slashes, _ = before.partition("://")
    return url if not mark else f"{scheme if slashes else ''}{slashes}{after}"
