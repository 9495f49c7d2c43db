# SPDX-License-Identifier: Apache-2.0
"""Addresses of hosts and ports, of both families, as users write them and as processes exchange them.

A host is a name or an address without brackets; only the text of an ``Address`` and URLs have brackets, which are
removed wherever a host is read. Cheap to import. Raises ``ValueError`` with a reason that does not repeat the text,
which may contain a password.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import NamedTuple

from yarl import URL


class Address(NamedTuple):
    """A host and a port. As text: ``127.0.0.1:80``, ``[::1]:80``."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{in_url(self.host)}:{self.port}"

    @classmethod
    def of(cls, text: str, port: int | None = None) -> Address:
        """From ``scheme://host:port``, ``host:port`` or, with a default for the port, ``host``."""
        text = text.strip()
        if _ip(text) is not None:
            url = URL.build(scheme="tcp", host=bare(text))
        else:
            url = URL(text if "://" in text else f"//{text}")
        found = url.explicit_port or port
        if not url.host or found is None:
            raise ValueError("write HOST:PORT, or [ADDRESS]:PORT for IPv6")
        return cls(url.host, found)


def bare(host: str) -> str:
    """A host without the brackets that URLs put around an IPv6 address."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def in_url(host: str) -> str:
    """A host as in a URL; other text stays."""
    return f"[{bare(host)}]" if ":" in host and _ip(host) is not None else host


def is_loopback(host: str) -> bool:
    """True for ``localhost`` and addresses of loopback; False for other names."""
    found = _ip(host)
    return host == "localhost" if found is None else found.is_loopback


def is_any(host: str) -> bool:
    """True for the address of all interfaces, which is only for listening."""
    found = _ip(host)
    return found is not None and found.is_unspecified


def dialled(host: str) -> str:
    """The address at which a listener on ``host`` is reached on this machine."""
    if not is_any(host):
        return bare(host)
    return "::1" if ":" in host else "127.0.0.1"


def listen(host: str, port: int = 0) -> socket.socket:
    """A listening TCP socket. A name with addresses of both families listens on IPv4. Raises ``OSError``."""
    host = bare(host)
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, where = min(found, key=lambda each: each[0] != socket.AF_INET)
    both = family == socket.AF_INET6 and is_any(host) and socket.has_dualstack_ipv6()
    return socket.create_server((str(where[0]), port), family=family, dualstack_ipv6=both)


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(bare(host))
    except ValueError:
        return None
