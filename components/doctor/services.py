# SPDX-License-Identifier: Apache-2.0
"""The servers and ports that a graph needs, asked from here. Every question ends within seconds; nothing is raised.

Servers that the environment names must answer. When none is named, ``dynamo serve`` starts its own: then the
programs must be installed.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Mapping
from urllib.parse import urlsplit

import httpx

from components.doctor.check import Check, State
from components.serve.servers import answers

_S = 2.0


def services(environment: Mapping[str, str], port: int) -> list[Check]:
    """All lines about servers and ports."""
    return [_etcd(environment), _nats(environment), _port(port)]


def _etcd(environment: Mapping[str, str]) -> Check:
    named = environment.get("ETCD_ENDPOINTS", "")
    if not named:
        return _program("etcd", "etcd", "etcd-server", "ETCD_ENDPOINTS")
    found, failed = [], []
    for url in named.split(","):
        try:
            reply = httpx.get(f"{url.rstrip('/')}/version", timeout=_S)
            found.append(f"{url} is {reply.json()['etcdserver']}")
        except (httpx.HTTPError, ValueError, KeyError) as error:
            failed.append(f"{url}: {error or type(error).__name__}")
    if failed:
        fix = "start it, or correct ETCD_ENDPOINTS; unset, dynamo serve starts one of its own"
        return Check("etcd", State.FAIL if not found else State.WARN, "; ".join(failed), fix)
    return Check("etcd", State.OK, "; ".join(found))


def _nats(environment: Mapping[str, str]) -> Check:
    named = environment.get("NATS_SERVER", "")
    if not named:
        return _program("NATS", "nats-server", "nats-server", "NATS_SERVER")
    parts = urlsplit(named if "://" in named else f"nats://{named}")
    address = (parts.hostname or "127.0.0.1", parts.port or 4222)
    try:
        with socket.create_connection(address, timeout=_S) as link:
            link.settimeout(_S)
            greeting = link.recv(4096)
    except OSError as error:
        fix = "start it, or correct NATS_SERVER; unset, dynamo serve starts one of its own"
        return Check("NATS", State.FAIL, f"{address[0]}:{address[1]}: {error}", fix)
    if not greeting.startswith(b"INFO "):
        return Check("NATS", State.FAIL, f"{address[0]}:{address[1]} is no NATS server", "correct NATS_SERVER")
    return Check("NATS", State.OK, f"{address[0]}:{address[1]}")


def _program(name: str, program: str, package: str, variable: str) -> Check:
    path = shutil.which(program)
    if path:
        return Check(name, State.OK, f"{variable} is not set; {path} will be started")
    return Check(name, State.FAIL, f"no {program}", f"apt-get install {package}, or name a running one in {variable}")


def _port(port: int) -> Check:
    if answers("127.0.0.1", port, 0.5):
        return Check("HTTP port", State.WARN, f"{port} is in use", f"stop what listens on {port}, or use --port")
    return Check("HTTP port", State.OK, f"{port} is free")
