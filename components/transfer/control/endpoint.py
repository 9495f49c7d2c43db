# SPDX-License-Identifier: Apache-2.0
"""Addresses of servers as users write them: parsed, resolved, and shown without their secrets.

``resolve`` runs on an asyncio loop and looks names up each time: a restarted server may have another address.
Errors: ``ConfigError`` for an address that cannot be read, ``MigrateError`` for a name that is not found.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from components.address import Address
from components.errors import ConfigError, MigrateError

_ETCD_PORT = 2379
_ANSWER_S = 2.0
_FAMILIES = ("ipv4", "ipv6")


@dataclass(frozen=True)
class Endpoint:
    """One server."""

    host: str
    port: int
    secure: bool

    @classmethod
    def of(cls, url: str) -> Endpoint:
        """From ``https://host:2379`` or ``host:2379``."""
        scheme, mark, _ = url.strip().partition("://")
        try:
            host, port = Address.of(url, _ETCD_PORT)
        except ValueError as error:
            raise ConfigError(f"etcd_endpoints {without_secrets(url)!r}: {error}") from error
        if mark and scheme not in ("http", "https"):
            raise ConfigError(f"etcd_endpoints {without_secrets(url)!r}: write http://host:2379 or https://host:2379")
        return cls(host, port, bool(mark) and scheme == "https")


async def resolve(endpoints: Sequence[Endpoint]) -> str:
    """gRPC's target for all endpoints. It has addresses of one family: the one that answers, IPv4 first."""
    found: list[Address] = []
    loop = asyncio.get_running_loop()
    trouble = ""
    for each in endpoints:
        try:
            answers = await loop.getaddrinfo(each.host, each.port, type=socket.SOCK_STREAM)
        except OSError as error:
            trouble = f"{each.host}: {error.strerror or error}"
            continue
        found.extend(Address(str(address[0]), each.port) for *_, address in answers)
    if not found:
        raise MigrateError(f"no address of {trouble}")
    families = {name: [a for a in dict.fromkeys(found) if (":" in a.host) == (name == "ipv6")] for name in _FAMILIES}
    if all(families.values()):
        there = dict(zip(found, await asyncio.gather(*map(_answers, found)), strict=True))
        families = {name: [a for a in each if there[a]] for name, each in families.items()}
    name = next((name for name in _FAMILIES if families[name]), "")
    if not name:
        raise MigrateError(f"nothing answers at {', '.join(map(str, found))}")
    return f"{name}:{','.join(map(str, families[name]))}"


async def _answers(where: Address) -> bool:
    try:
        async with asyncio.timeout(_ANSWER_S):
            _, writer = await asyncio.open_connection(*where)
    except OSError:
        return False
    writer.close()
    return True


def without_secrets(url: str) -> str:
    """The address without user, password or token."""
    before, mark, after = url.rpartition("@")
    scheme, slashes, _ = before.partition("://")
    return url if not mark else f"{scheme if slashes else ''}{slashes}{after}"
