# SPDX-License-Identifier: Apache-2.0
"""How commands find the running system: a small file per ``dynamo serve``, readable by its user only.

``ETCD_ENDPOINTS`` and ``DYN_NAMESPACE`` win over the file. Nothing secret is in it. The launcher removes it, or its
warden does; one that is there all the same is believed only while the process that wrote it lives, and else removed.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from components import env
from components.address import Address
from components.errors import ConfigError
from components.models import cache_folder
from components.serve.servers import answers
from components.serve.surroundings import quiet
from components.wire import UNREADABLE


class State(msgspec.Struct, frozen=True):
    """Where one running graph is."""

    namespace: str
    etcd: str
    port: int
    pid: int
    started: int = 0
    """When that process began, as the kernel counts it: another one may have its number now."""

    @classmethod
    def of_this_process(cls, namespace: str, etcd: str, port: int) -> State:
        """For ``remember``."""
        return cls(namespace, etcd, port, os.getpid(), _started(os.getpid()))

    @property
    def path(self) -> Path:
        """Its file."""
        return _folder() / f"{self.pid}.json"


def _started(pid: int) -> int:
    """Clock ticks between the start of the machine and that of the process; 0 when there is none."""
    try:
        # The second field is the program's name in parentheses, with whatever is in it.
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return 0


def _folder() -> Path:
    given = env.RUNTIME_FOLDER.read()
    return (Path(given) if given and os.access(given, os.W_OK) else cache_folder()) / "dynamo-migrate-run"


def remember(state: State) -> None:
    """Called when the graph serves."""
    _folder().mkdir(parents=True, exist_ok=True, mode=0o700)
    state.path.touch(mode=0o600)
    state.path.write_bytes(msgspec.json.encode(state))


def forget(state: State) -> None:
    """Called when it has ended."""
    state.path.unlink(missing_ok=True)


def join() -> None:
    """Point this process's environment at the running system. Raises ``ConfigError`` when there is none."""
    if env.ETCD_ENDPOINTS.read():
        return
    found = _running()
    if not found:
        raise ConfigError("no running system is known: start one with `dynamo serve`, or set ETCD_ENDPOINTS")
    os.environ["ETCD_ENDPOINTS"] = found[-1].etcd
    os.environ.setdefault("DYN_NAMESPACE", found[-1].namespace)


def _running() -> list[State]:
    """Launchers that live, the newest last. Files of others are removed."""
    found = []
    for path in _folder().glob("*.json"):
        try:
            state = msgspec.json.decode(path.read_bytes(), type=State)
        except (OSError, *UNREADABLE):
            continue  # Of a launcher that was killed while it wrote, or has just ended.
        if state.started and _started(state.pid) == state.started:
            found.append(state)
        else:
            path.unlink(missing_ok=True)
    return sorted(found, key=lambda state: state.started)


def reach() -> None:
    """``join``, for a command: also raises ``ConfigError`` when etcd does not answer, where Dynamo would wait."""
    join()
    quiet(os.environ)  # How Dynamo connects is of no use to who asks for a table.
    endpoints = [Address.of(url) for url in env.ETCD_ENDPOINTS.read()]
    if not any(answers(*where) for where in endpoints):
        where = " and ".join(map(str, endpoints))
        raise ConfigError(f"etcd does not answer at {where}: start it, or set ETCD_ENDPOINTS to where the graph has it")
