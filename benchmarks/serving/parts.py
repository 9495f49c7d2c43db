# SPDX-License-Identifier: Apache-2.0
"""What is compared, and the processes that each of them consists of."""

from __future__ import annotations

import itertools
import json
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from benchmarks.serving import shapes
from components.cli.serve import resolve
from components.config import WorkerConfig
from components.serve import precision
from components.serve.arguments import filled
from components.serve.servers import free_port
from components.transfer import Transport

_MAX_LEN = 4096
_BLOCK = 32
_SEATS = 16


class Size(NamedTuple):
    """Number of workers."""

    prefill: int
    decode: int
    """Or aggregated ones."""


SIZE = Size(1, 2)


class Kind(StrEnum):
    """What is compared."""

    VLLM = "vllm"
    """One ``vllm serve``: prefill and decode in one engine."""
    STOCK = "dynamo"
    """Dynamo's frontend, one prefill and two decode ``dynamo.vllm`` with vLLM's NixlConnector; defaults."""
    STOCK_RETRY = "dynamo+retry"
    """The same with ``--migration-limit 3``: Dynamo replays the tokens of a lost request on another worker."""
    STOCK_AGG = "dynamo-agg"
    """Dynamo's frontend and aggregated ``dynamo.vllm``, on GPUs with vLLM's NixlConnector, whose threads would take
    one of two cores on a machine without."""
    OURS = "migrate"
    """This package, one prefill and two decode workers, no planner."""
    PLANNER = "migrate+planner"
    """The same with Dynamo's planner and live migration."""
    OURS_AGG = "migrate-agg"
    """Dynamo's frontend and aggregated workers of this package."""
    PLANNER_AGG = "migrate-agg+planner"
    """The same with Dynamo's planner and live migration."""

    @property
    def ours(self) -> bool:
        """Are the workers this package's?"""
        return self.value.startswith("migrate")

    @property
    def workers(self) -> Kind:
        """The first kind with the same workers, of which only the processes in front of them differ."""
        same = {Kind.STOCK_RETRY: Kind.STOCK, Kind.PLANNER: Kind.OURS}
        return same.get(self, self)


TITLES = {
    Kind.VLLM: "one `vllm serve`",
    Kind.STOCK: "stock Dynamo: frontend, 1 prefill and 2 decode `dynamo.vllm`, vLLM's NixlConnector",
    Kind.STOCK_RETRY: "the same with `--migration-limit 3` (token replay by Dynamo's frontend)",
    Kind.OURS: "this package, 1 prefill and 2 decode workers, no planner",
    Kind.PLANNER: "the same with Dynamo's planner and live migration",
    Kind.STOCK_AGG: "stock Dynamo: frontend and aggregated `dynamo.vllm`, on GPUs with vLLM's NixlConnector",
    Kind.OURS_AGG: "Dynamo's frontend and aggregated workers of this package",
    Kind.PLANNER_AGG: "the same with Dynamo's planner and live migration",
}


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
                reply = httpx.get(f"http://127.0.0.1:{self.health_port}/health", timeout=2, trust_env=False)
                return reply.status_code == 200
            return False
        return True


ENGINE = {
    "PYTHONHASHSEED": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_SLEEP_WHEN_IDLE": "1",
    "DYN_LOG": "warn",
    "DYN_EVENT_PLANE": "zmq",
    "ETCD_LEASE_TTL": "60",
}
"""The same for every engine. Leases outlive a machine whose cores are all taken by a start. vLLM says in its log what
it has chosen."""
ON_GPU = {"dtype": "bfloat16", "enforce-eager": False, "use-fp64-gumbel": False, "block-size": 16}
"""Engine arguments in which GPUs differ."""


def on_gpu(device: str) -> dict[str, str]:
    """Environment of an engine on this GPU."""
    return {"CUDA_VISIBLE_DEVICES": device}


_UNIPROC = ["--distributed-executor-backend", "vllm.v1.executor.uniproc_executor.UniProcExecutor"]
"""The model in the engine's process, as in this package: otherwise two processes spin on two cores for each engine."""


def _flags(engine: Mapping[str, Any]) -> list[str]:
    """Engine arguments as vLLM's command line has them. A later one wins over an earlier one."""
    flags = []
    for name, value in engine.items():
        match value:
            case bool():
                flags.append(f"--{name}" if value else f"--no-{name}")
            case dict():
                flags += [f"--{name}", json.dumps(value)]
            case _:
                flags += [f"--{name}", str(value)]
    return flags


def _overrides(engine: Mapping[str, Any]) -> tuple[str, ...]:
    """Engine arguments as ``dynamo serve`` has them: keys of its own, and the rest as they are."""
    known = {name.replace("_", "-") for name in WorkerConfig.model_fields}
    rest = {name.replace("-", "_"): value for name, value in engine.items() if name not in known}
    own = tuple(f"--Common.{name}={json.dumps(value)}" for name, value in engine.items() if name in known)
    return (*own, f"--Common.engine-args={json.dumps(rest)}") if rest else own


def _vllm(model: str, port: int, engine: Mapping[str, Any]) -> list[Part]:
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--port", str(port), "--host", "127.0.0.1"]
    command += ["--model", str(shapes.folder(model)), "--served-model-name", model, "--max-model-len", str(_MAX_LEN)]
    command += ["--block-size", str(_BLOCK), "--enforce-eager", "--max-num-seqs", str(_SEATS), *_UNIPROC]
    command += _flags(engine)
    return [Part("vllm", "worker", command, ENGINE, health_port=port)]


def _socket(folder: Path) -> str:
    """A path for one, short enough wherever the logs are."""
    return f"{tempfile.gettempdir()}/{folder.name[:40]}-{secrets.token_hex(8)}"


def _stock(
    model: str, port: int, modes: list[str], migration_limit: int, engine: Mapping[str, Any], place: str, folder: Path
) -> list[Part]:
    front = [sys.executable, "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(port)]
    front += ["--router-mode", "kv", "--migration-limit", str(migration_limit)]
    parts = [Part("Frontend", "front", front, ENGINE)]
    for number, mode in enumerate(modes):
        command = [sys.executable, "-m", "benchmarks.serving.stock_worker", "--model", str(shapes.folder(model))]
        command += ["--served-model-name", model, "--max-model-len", str(_MAX_LEN), "--block-size", str(_BLOCK)]
        command += ["--enforce-eager", "--max-num-seqs", str(_SEATS), *_UNIPROC, "--disaggregation-mode", mode]
        if mode != "agg" or place == "cuda":
            connector = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": place}
            command += ["--kv-transfer-config", json.dumps(connector)]
        events = {"publisher": "zmq", "endpoint": f"ipc://{_socket(folder)}", "enable_kv_cache_events": True}
        command += ["--kv-events-config", json.dumps(events)]
        command += _flags(engine)
        health = free_port()
        own = {"DYN_SYSTEM_PORT": str(health), "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1"}
        own |= {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())}
        parts.append(Part(f"{mode}{number}", mode, command, ENGINE | own, health_port=health))
    return parts


def _ours(
    kind: Kind, model: str, port: int, transport: Transport, folder: Path, size: Size, more: tuple[str, ...]
) -> list[Part]:
    name = {Kind.OURS_AGG: "agg", Kind.PLANNER_AGG: "agg_planner", Kind.OURS: "disagg"}.get(kind, "planner")
    overrides = [f"--Common.model={shapes.folder(model)}", f"--Common.served-model-name={model}"]
    overrides += [f"--Common.max-num-seqs={_SEATS}"]
    if kind in (Kind.OURS_AGG, Kind.PLANNER_AGG):
        overrides += [f"--AggWorker.replicas={size.decode}"]
    else:
        overrides += [f"--PrefillWorker.replicas={size.prefill}", f"--DecodeWorker.replicas={size.decode}"]
    if kind is Kind.PLANNER:
        # Nothing here would carry out another number of workers.
        overrides += ["--Planner.policy-file=benchmarks/serving/policy.yaml", "--Planner.decode-workers=[2,2]"]
    overrides += more
    graph, config = f"graphs.{name}:Frontend", Path(f"configs/{name}.yaml")
    plan = resolve(graph, config, transport, port, "", overrides)
    parts = []
    for process in plan.processes:
        label = f"{process.component}{process.replica}"
        role = {"PrefillWorker": "prefill", "DecodeWorker": "decode", "AggWorker": "decode"}
        ready = None if process.component in ("Frontend", "Planner") else folder / f"{label}.ready"
        arguments, own = filled(process.command[1:], process.environment, _socket(folder))
        own |= {"DYN_SYSTEM_PORT": str(free_port())}
        own |= {"DYN_MIGRATE_READY_FILE": str(ready)} if ready else {}
        command = [sys.executable, *arguments]
        parts.append(Part(label, role.get(process.component, "front"), command, ENGINE | own, ready_file=ready))
    return parts


def parts_of(
    kind: Kind,
    model: str,
    port: int,
    transport: Transport,
    folder: Path,
    overrides: tuple[str, ...],
    engine: Mapping[str, Any],
    devices: tuple[int, ...] = (),
    size: Size = SIZE,
) -> list[Part]:
    """The processes of a system; those that bring requests have the role ``front``.

    ``devices``: the GPU of each worker in turn; without any they compute on the CPU.
    """
    place = "cuda" if devices else "cpu"
    # What this package takes for ``auto`` on this processor, the others get as well.
    engine = {**ON_GPU, **engine} if devices else {**engine, "dtype": precision.on_cpu(engine.get("dtype", "auto"))}
    match kind:
        case Kind.VLLM:
            parts = _vllm(model, port, engine)
        case Kind.STOCK | Kind.STOCK_RETRY:
            limit = 3 if kind is Kind.STOCK_RETRY else 0
            parts = _stock(
                model, port, ["prefill"] * size.prefill + ["decode"] * size.decode, limit, engine, place, folder
            )
        case Kind.STOCK_AGG:
            parts = _stock(model, port, ["agg"] * size.decode, 0, engine, place, folder)
        case _:
            parts = _ours(kind, model, port, transport, folder, size, _overrides(engine) + overrides)
    workers = (part for part in parts if part.role != "front")
    for part, device in zip(workers, itertools.cycle(devices), strict=False):
        part.environment |= on_gpu(str(device))
        part.environment.pop("TORCHDYNAMO_DISABLE", None)
    return parts
