# SPDX-License-Identifier: Apache-2.0
"""etcd and NATS for a graph: those named in the environment, or new ones on free loopback ports.

``ETCD_ENDPOINTS`` and ``NATS_SERVER`` win. New servers have a temporary folder and end with the graph; one that dies
is restarted on its port with its data. Raises ``ConfigError`` when a named server does not answer or the programs
are not installed, ``MigrateError`` when a new server dies too often.
"""

from __future__ import annotations

import functools
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from components import env
from components.address import Address, listen
from components.errors import ConfigError, MigrateError
from components.serve import family
from components.serve.warden import Warden

RESTARTS = 5
_random = random.SystemRandom()
"""Independent of seeds, so that two processes never try the same ports."""


def free_port() -> int:
    """A free TCP port.

    Below Linux's ports of outgoing connections (32768 and up), so that none of these takes it first, and within 16
    signed bits, as which Dynamo reads ``DYN_SYSTEM_PORT``.
    """
    for _ in range(200):
        port = _random.randint(20000, 32767)
        with socket.socket() as sock, suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("0.0.0.0", port))
            return port
    raise ConfigError("no free port between 20000 and 32767")


def answers(host: str, port: int, timeout_s: float = 2.0) -> bool:
    """True when the port accepts connections."""
    try:
        with socket.create_connection((host, port), timeout=timeout_s):
            return True
    except OSError:
        return False


def listens(host: str, port: int) -> bool:
    """True when this process can listen there."""
    try:
        listen(host, port).close()
    except OSError:
        return False
    return True


def etcd_command(data: Path, client: str, peer_port: int) -> list[str]:
    """A single etcd, for clients at the URL ``client``."""
    peer = f"http://127.0.0.1:{peer_port}"
    return [
        *("etcd", "--name", "graph", "--data-dir", str(data), "--log-level", "error"),
        *("--listen-client-urls", client, "--advertise-client-urls", client),
        *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
        *("--initial-cluster", f"graph={peer}"),
        *_unsynced(),
    ]


@functools.cache
def _unsynced() -> tuple[str, ...]:
    """Options that spare the disk: the data ends with the graph, and a busy disk must not let leases expire."""
    option = "--unsafe-no-fsync"  # Since etcd 3.4.14 and 3.5.
    try:
        known = subprocess.run(["etcd", option, "--version"], capture_output=True, timeout=10).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        known = False
    return (option,) if known else ()


def nats_command(data: Path, port: int, host: str = "127.0.0.1") -> list[str]:
    """One NATS server with JetStream."""
    return ["nats-server", "-a", host, "-p", str(port), "-js", "-sd", str(data)]


class Servers:
    """The two servers of a graph. ``start`` returns the variables for its processes.

    They end with the calling thread: call from the main thread, or from another one that lasts.
    """

    def __init__(self, warden: Warden | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="dynamo-migrate-")
        self._data = Path(self._folder.name)
        self._warden = warden
        if warden is not None:
            warden.keep_clean(self._data)
        self.processes: list[subprocess.Popen[bytes]] = []
        self._commands: list[list[str]] = []
        self._restarts = 0

    def start(self, environment: Mapping[str, str]) -> dict[str, str]:
        """Check named servers, then start the others. A failure leaves nothing running."""
        self._check(environment)
        try:
            return {
                env.ETCD_ENDPOINTS.name: ",".join(env.ETCD_ENDPOINTS.read(environment)) or self._own_etcd(),
                env.NATS_SERVER.name: ",".join(env.NATS_SERVER.read(environment)) or self._own_nats(),
            }
        except ConfigError:
            self.stop()
            raise

    def _check(self, environment: Mapping[str, str]) -> None:
        for variable in (env.ETCD_ENDPOINTS, env.NATS_SERVER):
            for url in variable.read(environment):
                where, name = Address.of(url, 4222), variable.name
                if not answers(*where):
                    raise ConfigError(f"{name} names {where}, where nothing answers: start it, or unset {name}")

    def _own_etcd(self) -> str:
        port = free_port()
        client = f"http://127.0.0.1:{port}"
        self._spawn(etcd_command(self._data / "etcd", client, free_port()))
        self._wait("etcd", port)
        return client

    def _own_nats(self) -> str:
        port = free_port()
        self._spawn(nats_command(self._data / "nats", port))
        self._wait("nats-server", port)
        return f"nats://127.0.0.1:{port}"

    def _spawn(self, command: list[str]) -> None:
        if shutil.which(command[0]) is None:
            raise ConfigError(
                f"{command[0]} is not installed: apt-get install etcd-server nats-server, "
                "or name running servers in ETCD_ENDPOINTS and NATS_SERVER"
            )
        self._commands.append(command)
        self.processes.append(self._popen(command))

    def _popen(self, command: list[str]) -> subprocess.Popen[bytes]:
        quiet = subprocess.DEVNULL
        process = subprocess.Popen(family.tied(command), stdout=quiet, stderr=quiet, start_new_session=True)
        if self._warden is not None:
            self._warden.cover(process.pid)
        return process

    def _gone(self, process: subprocess.Popen[bytes]) -> None:
        if self._warden is not None:
            self._warden.release(process.pid)

    def revive(self) -> list[str]:
        """Restart dead servers; returns their programs."""
        revived = []
        for number, (command, process) in enumerate(zip(self._commands, self.processes, strict=True)):
            if process.poll() is None:
                continue
            self._gone(process)
            self._restarts += 1
            if self._restarts > RESTARTS:
                raise MigrateError(f"{command[0]} has ended {RESTARTS} times; its data is in {self._data}")
            self.processes[number] = self._popen(command)
            revived.append(command[0])
        return revived

    def _wait(self, program: str, port: int, timeout_s: float = 20.0) -> None:
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if answers("127.0.0.1", port, 0.5):
                return
            time.sleep(0.05)
        raise ConfigError(f"{program} did not start within {timeout_s:g} s")

    def stop(self) -> None:
        """End the started servers and remove their data. Idempotent."""
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            self._gone(process)
        self.processes.clear()
        self._commands.clear()
        self._folder.cleanup()
