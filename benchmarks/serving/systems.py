# SPDX-License-Identifier: Apache-2.0
"""The systems under test, each as plain processes: started, restarted and stopped in the same way.

``start`` returns when the system answers on its port. Only this module supervises the processes, so that an ended
worker stays away until the benchmark starts it again. Raises ``MigrateError``.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import psutil

from benchmarks.serving.parts import SIZE, Kind, Part, Size, parts_of
from components.errors import MigrateError
from components.serve.servers import Servers, free_port
from components.transfer import Transport

START_S = 300.0
_MODEL_S = 20.0
"""Between a worker that is ready and a frontend that knows its model."""
_FRONT_S, _WORKER_S = 2.0, 6.0
"""How long processes that have nothing left to do may take to end."""
_LEAVE_S = 20.0
"""The same for those whose registration must be gone before others come in their place."""


@dataclass
class System:
    """A running system."""

    kind: Kind
    model: str
    port: int
    folder: Path
    parts: list[Part]
    parts_of: Callable[[Kind], list[Part]]
    servers: dict[str, str] = field(default_factory=dict)

    @property
    def workers(self) -> list[Part]:
        """Those that would hold a GPU each."""
        return [part for part in self.parts if part.role != "front"]

    @property
    def fronts(self) -> list[Part]:
        """Those that bring them requests."""
        return [part for part in self.parts if part.role == "front"]

    @property
    def url(self) -> str:
        """Where clients go."""
        return f"http://127.0.0.1:{self.port}"

    def log(self, part: Part) -> Path:
        """Its output."""
        return self.folder / f"{part.name}.log"

    def start(self, part: Part, nice: int = 0) -> None:
        """Start one process."""
        if part.ready_file is not None:
            part.ready_file.unlink(missing_ok=True)
        command = ["nice", "-n", str(nice), *part.command] if nice else part.command
        with self.log(part).open("ab") as output:
            part.process = subprocess.Popen(
                command,
                env=dict(os.environ) | self.servers | part.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        part.started = time.monotonic()

    def start_missing(self) -> None:
        """Start what does not run."""
        for part in self.parts:
            if part.process is None or part.process.poll() is not None:
                self.start(part)

    def wait(self, timeout_s: float = START_S) -> None:
        """Until it serves its model."""
        end = time.monotonic() + timeout_s
        self.wait_ready(self.parts, timeout_s)
        _wait_model(self, max(end, time.monotonic() + _MODEL_S))

    def become(self, kind: Kind) -> None:
        """Another kind with the same workers: other processes in front of them, and the workers that are missing."""
        self.end(self.fronts, _LEAVE_S)
        self.parts = [*self.workers, *(part for part in self.parts_of(kind) if part.role == "front")]
        self.kind = kind
        self.start_missing()
        self.wait()

    def end(self, parts: list[Part], timeout_s: float) -> None:
        """SIGTERM to all of them at once."""
        with ThreadPoolExecutor(max(1, len(parts))) as pool:
            list(pool.map(self.terminate, parts, itertools.repeat(timeout_s)))

    def wait_ready(self, parts: list[Part], timeout_s: float = START_S) -> None:
        """Until all of them serve."""
        end = time.monotonic() + timeout_s
        waiting = list(parts)
        while waiting:
            for part in list(waiting):
                if part.process is None or part.process.poll() is not None:
                    tail = self.log(part).read_text(errors="replace")[-2500:]
                    raise MigrateError(f"{self.kind}: {part.name} did not start:\n{tail}")
                if part.is_ready():
                    waiting.remove(part)
            if time.monotonic() > end:
                raise MigrateError(f"{self.kind}: {', '.join(p.name for p in waiting)} not ready in {timeout_s:g} s")
            time.sleep(0.2)

    def terminate(self, part: Part, timeout_s: float = 120.0) -> float:
        """SIGTERM and wait. Returns the seconds until it had ended."""
        if part.process is None or part.process.poll() is not None:
            return 0.0
        began = time.monotonic()
        family = _family(part.process.pid)
        part.process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            part.process.wait(timeout_s)
        part.seconds += time.monotonic() - part.started
        for member in [*family, psutil.Process(part.process.pid)] if part.process.poll() is None else family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        part.process.wait(10)
        return time.monotonic() - began

    def kill(self, part: Part) -> None:
        """SIGKILL to a process and all its children."""
        if part.process is None or part.process.poll() is not None:
            return
        for member in [psutil.Process(part.process.pid), *_family(part.process.pid)]:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        part.process.wait(10)
        part.seconds += time.monotonic() - part.started

    def busiest(self, parts: list[Part], over_s: float = 1.0) -> Part:
        """The one whose processes use most of the processor."""

        def used(part: Part) -> float:
            total = 0.0
            for member in [psutil.Process(part.process.pid), *_family(part.process.pid)] if part.process else []:
                with suppress(psutil.NoSuchProcess):
                    total += sum(member.cpu_times()[:2])
            return total

        before = {part.name: used(part) for part in parts}
        time.sleep(over_s)
        return max(parts, key=lambda part: used(part) - before[part.name])

    def worker_seconds(self) -> float:
        """Time that all workers together have been alive."""
        now = time.monotonic()
        alive = [p for p in self.workers if p.process is not None and p.process.poll() is None]
        return sum(p.seconds for p in self.workers) + sum(now - p.started for p in alive)

    def processor_seconds(self) -> dict[str, float]:
        """Time on processors so far by kind of process: ``front``, ``worker`` and ``engine``, its child."""
        found: dict[str, float] = {}
        for part in self.parts:
            role = "front" if part.role == "front" else "worker"
            for member in [psutil.Process(part.process.pid), *_family(part.process.pid)] if part.process else []:
                with suppress(psutil.NoSuchProcess):
                    times, name = member.cpu_times(), "engine" if _is_engine(member) else role
                    found[name] = found.get(name, 0.0) + times.user + times.system
        return found

    def retried(self) -> int:
        """Requests that the frontend has sent to another worker, so far: after a loss, and after moves."""
        if self.kind is Kind.VLLM:
            return 0
        text = httpx.get(f"{self.url}/metrics", timeout=10, trust_env=False).text
        return int(sum(float(v) for v in re.findall(r"^dynamo_frontend_model_migration_total\{.*\} (\S+)", text, re.M)))


def _family(pid: int) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


@contextmanager
def resting(systems: Iterable[System]) -> Iterator[None]:
    """Their engines stand still meanwhile: on two cores also an idle one takes some time."""
    engines = [
        member
        for system in systems
        for part in system.workers
        if part.process is not None
        for member in _family(part.process.pid)
        if _is_engine(member)
    ]
    try:
        for member in engines:
            member.suspend()
        yield
    finally:
        for member in engines:
            with suppress(psutil.NoSuchProcess):
                member.resume()


def _is_engine(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return "EngineCore" in process.name()
    return False


def raise_priority(part: Part) -> None:
    """Every thread of a process that was started with ``nice`` back to normal, as far as this user may."""
    if part.process is None:
        return
    for pid in [part.process.pid, *(member.pid for member in _family(part.process.pid))]:
        for thread in Path(f"/proc/{pid}/task").glob("*"):
            with suppress(PermissionError, ProcessLookupError):
                os.setpriority(os.PRIO_PROCESS, int(thread.name), 0)


@contextmanager
def running(
    kind: Kind,
    model: str,
    transport: Transport,
    logs: Path | None = None,
    overrides: tuple[str, ...] = (),
    engine: Mapping[str, Any] = MappingProxyType({}),
    devices: tuple[int, ...] = (),
    size: Size = SIZE,
    wait: bool = True,
) -> Iterator[System]:
    """Start a system, and end it with all its processes.

    ``overrides`` are those of ``dynamo serve``; ``engine`` are vLLM's own arguments, for all workers of any system;
    ``devices`` are the GPUs that workers take in turn. Without ``wait`` the system may not serve yet.
    """
    with tempfile.TemporaryDirectory(prefix="dynamo-migrate-bench-") as scratch:
        folder = logs / kind.value if logs else Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        port = free_port()

        def parts(kind: Kind) -> list[Part]:
            return parts_of(kind, model, port, transport, folder, overrides, engine, devices, size)

        servers = Servers()
        system = System(kind, model, port, folder, parts(kind), parts)
        try:
            if kind is not Kind.VLLM:
                system.servers = servers.start({})
            system.start_missing()
            if wait:
                system.wait()
            yield system
        finally:
            system.end(system.fronts, _FRONT_S)
            system.end(system.workers, _WORKER_S)
            servers.stop()


def _wait_model(system: System, end: float) -> None:
    while time.monotonic() < end:
        with suppress(httpx.HTTPError, ValueError):
            if httpx.get(f"{system.url}/v1/models", timeout=2, trust_env=False).json().get("data"):
                return
        time.sleep(0.2)
    raise MigrateError(f"{system.kind}: no model on {system.url} after its workers were ready")
