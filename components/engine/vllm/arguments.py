# SPDX-License-Identifier: Apache-2.0
"""Arguments of vLLM with which its engine can migrate requests.

``configure`` completes an ``AsyncEngineArgs`` before vLLM, or Dynamo's vLLM worker, makes an engine from it. It raises
``ConfigError`` with the value and the fix.

Other connectors, for example for KV that is offloaded to host memory, run beside this package's in vLLM's
``MultiConnector``. This package's comes first: it holds a request while its KV is copied, and vLLM then asks no other.

vLLM chooses the model runner (V2 on GPUs, V1 on CPUs and for features that V2 lacks): this package works with both,
and engines with different runners have different fingerprints.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from components.engine.vllm.compat import require_tested_vllm
from components.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

_MODULE = "components.engine.vllm"
STOCK_CONNECTOR = "NixlConnector"
"""vLLM's connector for disaggregated prefill. This package's does the same, so a command line may still name it."""
_OURS = "MigrationConnector"
_WRAPPER = "MultiConnector"
_HAND_OVER = ("NixlPullConnector", "NixlPushConnector", "MooncakeConnector", "MoRIIOConnector", "PdConnector")
"""Connectors for disaggregated prefill: an engine has one."""
_SCHEDULERS = {
    "": "AsyncMigrationScheduler",
    "vllm.v1.core.sched.async_scheduler.AsyncScheduler": "AsyncMigrationScheduler",
    "vllm.v1.core.sched.scheduler.Scheduler": "MigrationScheduler",
    "dynamo.vllm.instrumented_scheduler.InstrumentedScheduler": "InstrumentedMigrationScheduler",
}
"""This package's scheduler in place of another one."""


def configure(args: AsyncEngineArgs, agent: dict[str, Any], migration: dict[str, Any] | None = None) -> None:
    """Add scheduler, connector and worker extension to vLLM's arguments.

    ``agent`` has fields of ``components.transfer.AgentConfig``, ``migration`` those of ``migration.Settings``.
    """
    require_tested_vllm()
    from vllm.config import KVTransferConfig

    _refuse("worker_extension_cls", args.worker_extension_cls, "migration brings its own")
    if args.data_parallel_size > 1:
        raise ConfigError(f"data_parallel_size is {args.data_parallel_size}: start one worker for each replica instead")
    if args.pipeline_parallel_size > 1:
        raise ConfigError(
            f"pipeline_parallel_size is {args.pipeline_parallel_size}: requests cannot be migrated between pipelines; "
            "use tensor_parallel_size"
        )
    ours: dict[str, Any] = {
        "kv_connector": _OURS,
        "kv_connector_module_path": f"{_MODULE}.connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"agent": agent, "migration": migration or {}},
    }
    if others := [*_others(args.kv_transfer_config), *_offloading(args)]:
        children = {"connectors": [ours, *others]}
        ours = {"kv_connector": _WRAPPER, "kv_role": "kv_both", "kv_connector_extra_config": children}
    args.kv_transfer_config = KVTransferConfig(**ours, kv_load_failure_policy="recompute")
    args.worker_extension_cls = f"{_MODULE}.worker.WorkerExtension"
    args.scheduler_cls = _scheduler(args)
    if args.distributed_executor_backend is None:
        args.distributed_executor_backend = executor(args.tensor_parallel_size)


def _refuse(name: str, value: object, why: str) -> None:
    if value:
        raise ConfigError(f"{name} is {value!r}, but {why}: leave it out")


def _others(given: KVTransferConfig | None) -> list[dict[str, Any]]:
    """Connectors that stay beside ours, in the form of ``MultiConnector``'s children."""
    if given is None or not given.kv_connector:
        return []
    if given.kv_connector == _WRAPPER:
        found = [dict(child) for child in given.kv_connector_extra_config.get("connectors", ())]
    else:
        defaults = type(given)()
        fields = [field.name for field in dataclasses.fields(given) if field.name != "engine_id"]
        found = [{name: value for name in fields if (value := getattr(given, name)) != getattr(defaults, name)}]
    found = [child for child in found if child.get("kv_connector") not in (STOCK_CONNECTOR, _OURS)]
    for child in found:
        child.pop("kv_load_failure_policy", None)
        if (name := child.get("kv_connector")) in _HAND_OVER:
            raise ConfigError(f"kv_transfer_config names {name}, which does the work of {_OURS}: leave it out")
    return found


def _offloading(args: AsyncEngineArgs) -> list[dict[str, Any]]:
    """vLLM's own shorthand for a connector, which would take the place of ours."""
    size, args.kv_offloading_size = args.kv_offloading_size, None
    if size is None:
        return []
    if args.kv_offloading_backend == "lmcache":
        return [{"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both"}]
    from vllm import envs

    name = "SimpleCPUOffloadConnector" if envs.VLLM_USE_SIMPLE_KV_OFFLOAD else "OffloadingConnector"
    extra = {"cpu_bytes_to_use": int(size * (1 << 30))}
    return [{"kv_connector": name, "kv_role": "kv_both", "kv_connector_extra_config": extra}]


def _scheduler(args: AsyncEngineArgs) -> str:
    wanted = args.scheduler_cls or ""
    if isinstance(wanted, type):
        wanted = f"{wanted.__module__}.{wanted.__qualname__}"
    if not wanted and args.async_scheduling is False:
        wanted = "vllm.v1.core.sched.scheduler.Scheduler"
    if wanted not in _SCHEDULERS:
        known = ", ".join(name for name in _SCHEDULERS if name)
        raise ConfigError(f"scheduler_cls is {wanted}; requests can be migrated with one of {known}, or without it")
    return f"{_MODULE}.scheduler.{_SCHEDULERS[wanted]}"


def executor(tensor_parallel_size: int) -> str | None:
    """Keep the model in the engine's process. On CPUs vLLM would start another and spin on two cores to talk to it."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and tensor_parallel_size == 1:
        return "vllm.v1.executor.uniproc_executor.UniProcExecutor"
    return None
