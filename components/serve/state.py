# SPDX-License-Identifier: Apache-2.0
"""Files by which commands find the running system: one per ``dynamo serve``, readable by its user only.

``ETCD_ENDPOINTS`` and ``DYN_NAMESPACE`` win over the file. It has no secrets. The launcher or its warden removes it;
a file without its living launcher is ignored and removed.
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
    """Addresses of one running graph."""

    namespace: str
    etcd: str
    port: int
    pid: int
    started: int = 0
    """Start of that process on the kernel's clock: a new process may have its number."""

    @classmethod
    def of_this_process(cls, namespace: str, etcd: str, port: int) -> State:
        """For ``remember``."""
        return cls(namespace, etcd, port, os.getpid(), _started(os.getpid()))

    @property
    def path(self) -> Path:
        """Its file."""
        return _folder() / f"{self.pid}.json"


def _started(pid: int) -> int:
    """Clock ticks from the start of the machine to that of the process; 0: no such process."""
    try:
        # The second field is the program's name in parentheses, with any characters.
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
    """Called when the graph has ended."""
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
    """Living launchers, the newest last. Removes other files."""
    found = []
    for path in _folder().glob("*.json"):
        try:
            state = msgspec.json.decode(path.read_bytes(), type=State)
        except (OSError, *UNREADABLE):
            continue  # Its launcher was killed while writing, or has just ended.
        if state.started and _started(state.pid) == state.started:
            found.append(state)
        else:
            path.unlink(missing_ok=True)
    return sorted(found, key=lambda state: state.started)


def reach() -> None:
    """``join``, for a command: also raises ``ConfigError`` when etcd does not answer, where Dynamo would wait."""
    join()
    quiet(os.environ)  # Dynamo's log of its connection does not help the reader of a table.
    endpoints = [Address.of(url) for url in env.ETCD_ENDPOINTS.read()]
    if not any(answers(*where) for where in endpoints):
        where = " and ".join(map(str, endpoints))
        raise ConfigError(f"etcd does not answer at {where}: start it, or set ETCD_ENDPOINTS to where the graph has it")
