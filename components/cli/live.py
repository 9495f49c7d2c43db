# SPDX-License-Identifier: Apache-2.0
"""How commands find the running system: a small file per ``dynamo serve``, readable by its user only.

``ETCD_ENDPOINTS`` and ``DYN_NAMESPACE`` win over the file. Nothing secret is in it.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import psutil

from components.address import parts_of
from components.errors import ConfigError
from components.models import cache_folder
from components.serve.servers import answers
from components.wire import UNREADABLE


class State(msgspec.Struct, frozen=True):
    """Where one running graph is."""

    namespace: str
    etcd: str
    port: int
    pid: int


def _folder() -> Path:
    return Path(os.environ.get("XDG_RUNTIME_DIR", str(cache_folder()))) / "dynamo-migrate-run"


def _file(state: State) -> Path:
    return _folder() / f"{state.pid}.json"


def remember(state: State) -> None:
    """Called when the graph serves."""
    _folder().mkdir(parents=True, exist_ok=True, mode=0o700)
    path = _file(state)
    path.touch(mode=0o600)
    path.write_bytes(msgspec.json.encode(state))


def forget(state: State) -> None:
    """Called when it has ended."""
    _file(state).unlink(missing_ok=True)


def join() -> None:
    """Point this process's environment at the running system. Raises ``ConfigError`` when there is none."""
    if os.environ.get("ETCD_ENDPOINTS"):
        return
    found = []
    for path in sorted(_folder().glob("*.json"), key=lambda p: p.stat().st_mtime):
        try:
            state = msgspec.json.decode(path.read_bytes(), type=State)
        except (OSError, *UNREADABLE):
            continue  # Of a launcher that was killed while it wrote, or has just ended.
        if psutil.pid_exists(state.pid):
            found.append(state)
    if not found:
        raise ConfigError("no running system is known: start one with `dynamo serve`, or set ETCD_ENDPOINTS")
    os.environ["ETCD_ENDPOINTS"] = found[-1].etcd
    os.environ.setdefault("DYN_NAMESPACE", found[-1].namespace)


def reach() -> None:
    """``join``, for a command: also raises ``ConfigError`` when etcd does not answer, where Dynamo would wait."""
    join()
    # Before Dynamo is imported: how it connects is of no use to who asks for a table. ``DYN_LOG=info`` shows it.
    os.environ.setdefault("DYN_LOG", "error")
    endpoints = os.environ["ETCD_ENDPOINTS"].split(",")
    for endpoint in endpoints:
        try:
            parts = parts_of(endpoint.strip())
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if not host or not port:
            raise ConfigError(f"ETCD_ENDPOINTS: {endpoint!r} is no address: write http://HOST:2379")
        if answers(host, port):
            return
    where = " and ".join(f"{parts_of(endpoint).hostname}:{parts_of(endpoint).port}" for endpoint in endpoints)
    raise ConfigError(f"etcd does not answer at {where}: start it, or set ETCD_ENDPOINTS to where the graph has it")


def nobody_answers(namespace: str) -> str:
    """What to tell when there is an etcd, but no router."""
    return (
        f"no router in namespace {namespace} answers: is the graph running, and are DYN_NAMESPACE and ETCD_ENDPOINTS "
        "those it was started with?"
    )
