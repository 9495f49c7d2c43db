# SPDX-License-Identifier: Apache-2.0
"""The systems under test, each as plain processes: started, restarted and stopped in the same way.

``start`` returns when the system answers on its port. Nothing supervises the processes but this module, so that a
worker that is told to end stays away until the benchmark starts it again. Raises ``MigrateError``.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import psutil

from components import models
from components.cli.serve import resolve
from components.errors import MigrateError
from components.serve import precision
from components.serve.servers import Servers, free_port, system_port
from components.transfer import Transport

_START_S = 300.0
_MAX_LEN = 4096
_BLOCK = 32
_SEATS = 16


class Kind(StrEnum):
    """What is compared."""

    VLLM = "vllm"
    """One ``vllm serve``: prefill and decode in one engine."""
    STOCK = "dynamo"
    """Dynamo's frontend, one prefill and two decode ``dynamo.vllm`` with vLLM's NixlConnector; defaults."""
    STOCK_RETRY = "dynamo+retry"
    """The same with ``--migration-limit 3``: Dynamo replays the tokens of a lost request on another worker."""
    STOCK_AGG = "dynamo-agg"
    """Dynamo's frontend and two aggregated ``dynamo.vllm``, no connector."""
    OURS = "migrate"
    """This package, one prefill and two decode workers, no planner."""
    PLANNER = "migrate+planner"
    """The same with Dynamo's planner and live migration."""
    REPLAY = "migrate+replay"
    """The same, but requests move by token replay."""
    OURS_AGG = "migrate-agg"
    """This package's router, connector and transfer over two aggregated workers."""

    @property
    def ours(self) -> bool:
        """Does it have this package's router?"""
        return self.value.startswith("migrate")


@dataclass
class Part:
    """One process of a system."""

    name: str
    role: str
    """``worker`` for those that hold a GPU; ``decode`` ones can be retired."""
    command: list[str]
    environment: dict[str, str]
    health_port: int = 0
    ready_file: Path | None = None
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    seconds: float = 0.0
    """Time alive so far, of lives that are over."""

    def is_ready(self) -> bool:
        """Does it serve?"""
        if self.ready_file is not None:
            return self.ready_file.exists()
        if self.health_port:
            with suppress(httpx.HTTPError):
                return httpx.get(f"http://127.0.0.1:{self.health_port}/health", timeout=2).status_code == 200
            return False
        return True


@dataclass
class System:
    """A running system."""

    kind: Kind
    model: str
    port: int
    folder: Path
    parts: list[Part]
    servers: dict[str, str] = field(default_factory=dict)

    @property
    def workers(self) -> list[Part]:
        """Those that would hold a GPU each."""
        return [part for part in self.parts if part.role != "front"]

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

    def wait_ready(self, parts: list[Part], timeout_s: float = _START_S) -> None:
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
        """Time on processors so far by process, its children included; workers together."""
        found: dict[str, float] = {}
        for part in self.parts:
            name = "workers" if part in self.workers else part.name.rstrip("0").lower()
            for member in [psutil.Process(part.process.pid), *_family(part.process.pid)] if part.process else []:
                with suppress(psutil.NoSuchProcess):
                    times = member.cpu_times()
                    found[name] = found.get(name, 0.0) + times.user + times.system
        return found

    def retried(self) -> int:
        """Requests that were replayed after the loss of a worker, so far."""
        if self.kind.ours:
            logs = [self.log(part).read_text(errors="replace") for part in self.parts if part.name.startswith("Router")]
            return sum(log.count(" is replayed: ") for log in logs)
        if self.kind is Kind.VLLM:
            return 0
        text = httpx.get(f"{self.url}/metrics", timeout=10).text
        return int(sum(float(v) for v in re.findall(r"^dynamo_frontend_model_migration_total\{.*\} (\S+)", text, re.M)))


def _family(pid: int) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def raise_priority(part: Part) -> None:
    """Every thread of a process that was started with ``nice`` back to normal, as far as this user may."""
    if part.process is None:
        return
    for pid in [part.process.pid, *(member.pid for member in _family(part.process.pid))]:
        for thread in Path(f"/proc/{pid}/task").glob("*"):
            with suppress(PermissionError, ProcessLookupError):
                os.setpriority(os.PRIO_PROCESS, int(thread.name), 0)


_ENGINE = {
    "PYTHONHASHSEED": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_SLEEP_WHEN_IDLE": "1",
    "DYN_LOG": "warn",
    "DYN_EVENT_PLANE": "zmq",
    "ETCD_LEASE_TTL": "60",
}
"""The same for every engine. Leases outlive a machine whose cores are all taken by a start."""


_UNIPROC = ["--distributed-executor-backend", "vllm.v1.executor.uniproc_executor.UniProcExecutor"]
"""The model in the engine's process, as in this package: otherwise two processes spin on two cores for each engine."""


def _flags(engine: Mapping[str, Any]) -> list[str]:
    """Engine arguments as vLLM's command line has them. A later one wins over an earlier one."""
    flags = []
    for name, value in engine.items():
        match value:
            case True | False:
                flags.append(f"--{name}" if value else f"--no-{name}")
            case _:
                flags += [f"--{name}", str(value)]
    return flags


def _vllm(model: str, port: int, engine: Mapping[str, Any]) -> list[Part]:
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--port", str(port), "--host", "127.0.0.1"]
    command += ["--model", models.resolve(model), "--served-model-name", model, "--max-model-len", str(_MAX_LEN)]
    command += ["--block-size", str(_BLOCK), "--enforce-eager", "--max-num-seqs", str(_SEATS), *_UNIPROC]
    command += _flags(engine)
    return [Part("vllm", "worker", command, _ENGINE, health_port=port)]


def _stock(model: str, port: int, modes: list[str], migration_limit: int, engine: Mapping[str, Any]) -> list[Part]:
    front = [sys.executable, "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(port)]
    front += ["--router-mode", "round-robin", "--migration-limit", str(migration_limit)]
    parts = [Part("Frontend", "front", front, _ENGINE)]
    for number, mode in enumerate(modes):
        command = [sys.executable, "-m", "benchmarks.serving.stock_worker", "--model", models.resolve(model)]
        command += ["--served-model-name", model, "--max-model-len", str(_MAX_LEN), "--block-size", str(_BLOCK)]
        command += ["--enforce-eager", "--max-num-seqs", str(_SEATS), *_UNIPROC, "--disaggregation-mode", mode]
        if mode != "agg":
            connector = '{"kv_connector":"NixlConnector","kv_role":"kv_both","kv_buffer_device":"cpu"}'
            command += ["--kv-transfer-config", connector]
        command += _flags(engine)
        health = system_port()
        own = {"DYN_SYSTEM_PORT": str(health), "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1"}
        own |= {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())}
        parts.append(Part(f"{mode}{number}", mode, command, _ENGINE | own, health_port=health))
    return parts


def _ours(kind: Kind, model: str, port: int, transport: Transport, folder: Path, more: tuple[str, ...]) -> list[Part]:
    name = {Kind.OURS_AGG: "agg", Kind.OURS: "disagg"}.get(kind, "planner")
    overrides = [f"--Common.model={model}", f"--Common.max-num-seqs={_SEATS}"]
    if kind in (Kind.PLANNER, Kind.REPLAY):
        # Nothing here would carry out another number of workers.
        overrides += ["--Planner.policy-file=benchmarks/serving/policy.yaml", "--Planner.decode-workers=[2,2]"]
    if kind is Kind.REPLAY:
        overrides.append("--Router.migration-mode=replay")
    overrides += more
    graph, config = f"graphs.{name}:Frontend", Path(f"configs/{name}.yaml")
    plan = resolve(graph, config, transport, port, "", overrides)
    parts = []
    for process in plan.processes:
        label = f"{process.component}{process.replica}"
        role = {"PrefillWorker": "prefill", "DecodeWorker": "decode", "AggWorker": "decode"}
        ready = None if process.component in ("Frontend", "Planner") else folder / f"{label}.ready"
        own = process.environment | {"DYN_SYSTEM_PORT": str(system_port())}
        own |= {"DYN_MIGRATE_READY_FILE": str(ready)} if ready else {}
        command = [sys.executable, *process.command[1:]]
        parts.append(Part(label, role.get(process.component, "front"), command, _ENGINE | own, ready_file=ready))
    return parts


@contextmanager
def running(
    kind: Kind,
    model: str,
    transport: Transport,
    logs: Path | None = None,
    overrides: tuple[str, ...] = (),
    engine: Mapping[str, Any] = MappingProxyType({}),
) -> Iterator[System]:
    """Start a system, and end it with all its processes.

    ``overrides`` are those of ``dynamo serve``; ``engine`` are vLLM's own arguments, for all workers of any system.
    """
    with tempfile.TemporaryDirectory(prefix="dynamo-migrate-bench-") as scratch:
        folder = logs / kind.value if logs else Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        # What this package takes for ``auto`` on this processor, the others get as well.
        engine = {**engine, "dtype": precision.on_cpu(engine.get("dtype", "auto"))}
        match kind:
            case Kind.VLLM:
                parts = _vllm(model, port, engine)
            case Kind.STOCK | Kind.STOCK_RETRY:
                limit = 3 if kind is Kind.STOCK_RETRY else 0
                parts = _stock(model, port, ["prefill", "decode", "decode"], limit, engine)
            case Kind.STOCK_AGG:
                parts = _stock(model, port, ["agg", "agg"], 0, engine)
            case _:
                common = tuple(f"--Common.{name}={json.dumps(value)}" for name, value in engine.items())
                parts = _ours(kind, model, port, transport, folder, common + overrides)
        servers = Servers()
        system = System(kind, model, port, folder, parts)
        try:
            if kind is not Kind.VLLM:
                system.servers = servers.start({})
            for part in parts:
                system.start(part)
            system.wait_ready(parts)
            _wait_model(system)
            yield system
        finally:
            # Those that bring requests end first, then all workers at once: nobody waits for a request to come.
            for ending, timeout_s in (([p for p in parts if p.role == "front"], 5.0), (system.workers, 20.0)):
                with ThreadPoolExecutor(max(1, len(ending))) as pool:
                    list(pool.map(system.terminate, ending, itertools.repeat(timeout_s)))
            servers.stop()


def _wait_model(system: System) -> None:
    end = time.monotonic() + 60.0
    while time.monotonic() < end:
        with suppress(httpx.HTTPError, ValueError):
            if httpx.get(f"{system.url}/v1/models", timeout=2).json().get("data"):
                return
        time.sleep(0.2)
    raise MigrateError(f"{system.kind}: no model on {system.url} after its workers were ready")
