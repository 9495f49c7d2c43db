# SPDX-License-Identifier: Apache-2.0
"""Makes the plan of processes from a graph, a YAML file and overrides. Pure: starts nothing.

Raises ``ConfigError`` for unknown components and keys, wrong values, missing models and absent devices.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from components import env, yamltext
from components.address import Address, dialled
from components.config import (
    ComponentConfig,
    FrontendConfig,
    Given,
    PlannerConfig,
    WorkerConfig,
    dashed,
    nearest,
    parse,
)
from components.errors import ConfigError
from components.models import adapters, weights
from components.serve import arguments, memory, precision, reach
from components.serve.graph import Service
from components.transfer import lanes
from components.transfer.config import Transport

_END_S = 30.0
"""Time for a worker's end beside its drain, on a machine with other workers that end at the same time."""
_STREAM_LEASE_S = "20"
"""Lease in etcd, in seconds, of processes with clients' streams. After a restart of etcd Dynamo's runtime first
reconnects its watches, one after the other with pauses, then the lease: on a busy machine the default of 10 s can end
before, and with it the process."""
_LEASE_S = 10
"""Dynamo's default lease in etcd, in seconds."""
_ACKNOWLEDGED_S = "DYN_TCP_REQUEST_TIMEOUT"
"""Seconds for which a frontend waits for a request to be acknowledged: a worker's lease. With Dynamo's
default of 5 s requests fail when all workers of a kind stand still for that time, as on a busy host."""
_SECRET = re.compile(r"(^|[-_])(password|passwd|secret|token|api[-_]?key|credentials?)$", re.IGNORECASE)
"""Names with hidden values, also in ``engine-args``."""


class Process(BaseModel):
    """One process of the plan."""

    component: str
    replica: int
    role: str = ""
    command: list[str]
    environment: dict[str, str]
    port: int = 0
    """Port of a frontend."""
    stop_s: float = 10.0
    """Longest time to end after SIGTERM."""


class Plan(BaseModel):
    """Everything that ``dynamo serve`` starts, in order."""

    namespace: str
    transport: str
    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    processes: list[Process]
    spare: list[Process] = []
    """Workers that the planner may add later."""
    bounds: dict[str, tuple[int, int]] = {}
    """Fewest and most workers by role, for roles that the planner scales."""
    said: list[str] = []
    """Messages for the user before the start."""

    @property
    def url(self) -> str:
        """URL of the first frontend on this machine."""
        return self.url_of(self.port)

    def url_of(self, port: int) -> str:
        """URL of the frontend on this port."""
        return f"http://{Address(dialled(self.host), port)}"

    @property
    def ports(self) -> list[int]:
        """Ports of all frontends."""
        return [process.port for process in self.processes if process.port]

    def shown(self) -> str:
        """As JSON, for ``--dry-run``, without passwords and tokens."""
        return json.dumps(_without_secrets(self.model_dump(mode="json")), indent=2)


def _without_secrets(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _without_secrets(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_secrets(inner, name) for inner in value]
    if isinstance(value, str) and value.startswith("--"):
        flag, equals, _ = value.partition("=")
        return f"{flag}=***" if equals and _SECRET.search(flag) else value
    if isinstance(value, str) and value.startswith("{"):
        with contextlib.suppress(ValueError):
            return json.dumps(_without_secrets(json.loads(value)))
    return "***" if value and _SECRET.search(name) else value


def read_yaml(path: Path) -> dict[str, dict[str, Any]]:
    """The configuration file. Raises ``ConfigError`` naming the wrong line."""
    try:
        data = yamltext.read(path) or {}
    except FileNotFoundError as error:
        raise ConfigError(f"there is no configuration file {path}") from error
    if not isinstance(data, dict) or not all(isinstance(v, dict) for v in data.values()):
        raise ConfigError(f"{path}: the top level must be component names, each with its keys below")
    for key in [*data, *(key for keys in data.values() for key in keys)]:
        if not isinstance(key, str):
            # YAML reads on, off, yes, no and numbers as other types than text.
            raise ConfigError(f"{path}: YAML reads one of the keys as {key!r}, which is no text: correct or quote it")
    return {name: {dashed(key): value for key, value in block.items()} for name, block in data.items()}


def parse_overrides(arguments: list[str]) -> dict[str, dict[str, Any]]:
    """``--Component.key=value`` arguments; values are parsed later, by key."""
    found: dict[str, dict[str, Any]] = {}
    for argument in arguments:
        path, equals, value = argument.removeprefix("--").partition("=")
        component, dot, key = path.partition(".")
        if not (argument.startswith("--") and equals and dot):
            example = f"--{path}=VALUE" if dot else "--Component.key=value, for example --DecodeWorker.replicas=3"
            raise ConfigError(
                f"{argument!r} is neither an option nor an override of the configuration: write {example}"
            )
        found.setdefault(component, {})[dashed(key)] = Given(value)
    return found


def make_plan(
    entry: Service,
    values: dict[str, dict[str, Any]],
    overrides: dict[str, dict[str, Any]],
    transport: Transport,
    environment: Mapping[str, str],
    only: list[str] | None = None,
    names_of_models: Mapping[str, str] | None = None,
) -> Plan:
    """Resolve everything. ``Common`` applies to each component with the key; ``components.config`` has the precedence.

    ``names_of_models``: clients' names of models by folder, used where no key sets one.
    """
    services = entry.start_order()
    names = [service.name for service in services]
    for name in [*values, *overrides, *(only or [])]:
        if name not in [*names, "Common"]:
            raise ConfigError(f"the graph has no component {name!r}{nearest(name, [*names, 'Common'])}")
    lanes.check(transport)
    known = {dashed(field) for service in services for field in service.config.model_fields}
    for key in (*values.get("Common", {}), *overrides.get("Common", {})):
        if key not in known:
            raise ConfigError(f"Common has no key {key!r}{nearest(key, sorted(known))}")
    namespace = env.NAMESPACE.read(environment)
    plan = Plan(namespace=namespace, transport=transport.value, model="", processes=[])
    configs: dict[str, ComponentConfig] = {}
    for service in services:
        config = parse(service.config, service.name, _settings(service, values) | _settings(service, overrides))
        named = config.served_model_name or (names_of_models or {}).get(config.model, config.model)
        configs[service.name] = precision.resolve(config.model_copy(update={"served_model_name": named}))
    plan.bounds = _bounds(services, configs)
    for service in services:
        config = configs[service.name]
        plan.model = plan.model or config.served_model_name
        if isinstance(config, FrontendConfig):
            plan.host, plan.port = config.host, config.port
        if only and service.name not in only:
            continue
        for replica in range(config.replicas):
            plan.processes.append(_process(service, config, replica, plan, configs, environment))
        for replica in range(config.replicas, plan.bounds.get(service.role, (0, 0))[1]):
            plan.spare.append(_process(service, config, replica, plan, configs, environment))
    for component, config in configs.items():
        if config.lora_modules != configs[entry.name].lora_modules:
            raise ConfigError(f"{component}.lora-modules differs from that of {entry.name}: write it in Common")
        adapters.check(config.lora_modules, (config.served_model_name or config.model,))
    for component in dict.fromkeys(process.component for process in [*plan.processes, *plan.spare]):
        worker = configs[component]
        if isinstance(worker, WorkerConfig) and worker.engine == "vllm":
            weights.check(worker.model, str(worker.engine_flags.get("load-format", "auto")))
    here = [(p.component, configs[p.component]) for p in [*plan.processes, *plan.spare]]
    memory.check(here)
    plan.said = [line for line in (memory.shared(here),) if line]
    return plan


def _settings(service: Service, values: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    fields = {dashed(field) for field in service.config.model_fields}
    return {k: v for k, v in values.get("Common", {}).items() if k in fields} | values.get(service.name, {})


def _bounds(services: list[Service], configs: dict[str, ComponentConfig]) -> dict[str, tuple[int, int]]:
    """Bounds for the planner. Its configuration also gets the fixed numbers."""
    for service in services:
        planner = configs[service.name]
        if not isinstance(planner, PlannerConfig) or not (planner.decode_workers or planner.prefill_workers):
            continue
        found = {"decode": planner.decode_workers, "prefill": planner.prefill_workers}
        started: dict[str, int] = {}
        for worker in services:
            if not worker.role:
                continue
            count = configs[worker.name].replicas
            low, high = found[worker.role] or (count, count)
            if not low <= count <= high:
                raise ConfigError(
                    f"{worker.name}.replicas = {count} is outside {service.name}.{worker.role}-workers = "
                    f"[{low}, {high}]: change one of them"
                )
            found[worker.role] = (low, high)
            started[worker.role] = started.get(worker.role, 0) + count
        added = {f"{role}_workers": b for role, b in found.items()} | {"started": started}
        configs[service.name] = planner.model_copy(update=added)
        return {role: bounds for role, bounds in found.items() if bounds is not None}
    return {}


def _process(
    service: Service,
    config: ComponentConfig,
    replica: int,
    plan: Plan,
    configs: Mapping[str, ComponentConfig],
    environment: Mapping[str, str],
) -> Process:
    added = {
        "DYN_MIGRATE_COMPONENT": service.name,
        "DYN_MIGRATE_REPLICA": str(replica),
        "DYN_NAMESPACE": plan.namespace,
        "DYN_MIGRATE_TRANSPORT": plan.transport,
        **reach.variables(environment, getattr(config, "advertise_host", "127.0.0.1")),
    }
    command, port, stop_s = ["python", "-m", service.module], 0, 10.0
    if isinstance(config, FrontendConfig):
        command += arguments.frontend(config, replica)
        port = config.port + replica
        if _ACKNOWLEDGED_S not in environment:
            added[_ACKNOWLEDGED_S] = str(env.ETCD_LEASE_TTL.read(environment) or _LEASE_S)
    elif isinstance(config, WorkerConfig):
        others = list(configs.values())
        repeats = any(c.migration_limit for c in others if isinstance(c, FrontendConfig))
        planned = any(isinstance(c, PlannerConfig) for c in others)
        added |= arguments.worker_environment(config, repeats, planned)
        added |= lanes.environment(Transport(plan.transport), environment)
        added |= _device_environment(service.name, config, replica)
        stop_s = config.drain_grace_s + _END_S
        if config.engine == "paged":
            command[2] += ".mocker"
            added["DYN_MIGRATE_MODE"] = service.mode
            added["DYN_MIGRATE_CONFIG"] = json.dumps(config.model_dump(by_alias=True))
        else:
            command += arguments.worker(config, service.mode, replica)
    else:
        added["DYN_MIGRATE_CONFIG"] = json.dumps(config.model_dump(by_alias=True))
    if not isinstance(config, WorkerConfig) and not env.ETCD_LEASE_TTL.read(environment):
        added["ETCD_LEASE_TTL"] = _STREAM_LEASE_S
    if os.path.isdir(config.model):
        added["HF_HUB_OFFLINE"] = "1"
    return Process(
        component=service.name,
        replica=replica,
        role=service.role,
        command=command,
        environment=added,
        port=port,
        stop_s=stop_s,
    )


def _device_environment(name: str, config: WorkerConfig, replica: int) -> dict[str, str]:
    if config.devices:
        if replica >= len(config.devices):
            raise ConfigError(f"{name}.devices names {len(config.devices)} replicas, {config.replicas} are asked for")
        mine = config.devices[replica]
        if len(mine) != config.ranks_of(replica):
            raise ConfigError(
                f"{name}.devices[{replica}] has {len(mine)} GPUs, tensor-parallel-size is {config.ranks_of(replica)}"
            )
        return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, mine))}
    threads = env.THREADS.read()
    # Numba, which finds vLLM's drafts in the prompt, gives its own number to all OpenMP of the process: by default all
    # cores, and then each operation of several engines waits for threads that do not run.
    given = {env.THREADS.name: threads, "NUMBA_NUM_THREADS": threads}
    return given if config.engine == "paged" else {"VLLM_CPU_OMP_THREADS_BIND": "nobind", **given}
