# SPDX-License-Identifier: Apache-2.0
"""Arguments of vLLM with which its engine can migrate requests.

``configure`` completes an ``AsyncEngineArgs`` before vLLM, or Dynamo's vLLM worker, makes an engine from it. It raises
``ConfigError`` with the value and the fix.

vLLM chooses the model runner (V2 on GPUs, V1 on CPUs and for features that V2 lacks): this package works with both,
and engines with different runners have different fingerprints.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from components.engine.vllm.compat import require_tested_vllm
from components.errors import ConfigError

if TYPE_CHECKING:
    from vllm.engine.arg_utils import AsyncEngineArgs

_MODULE = "components.engine.vllm"
STOCK_CONNECTOR = "NixlConnector"
"""vLLM's connector for disaggregated prefill. This package's does the same, so a command line may still name it."""
_SCHEDULERS = {
    "": "AsyncMigrationScheduler",
    "vllm.v1.core.sched.async_scheduler.AsyncScheduler": "AsyncMigrationScheduler",
    "vllm.v1.core.sched.scheduler.Scheduler": "MigrationScheduler",
    "dynamo.vllm.instrumented_scheduler.InstrumentedScheduler": "InstrumentedMigrationScheduler",
}
"""This package's connector in place of another one."""


def configure(args: AsyncEngineArgs, agent: dict[str, Any], migration: dict[str, Any] | None = None) -> None:
    """Add scheduler, connector and worker extension to vLLM's arguments.

    ``agent`` has fields of ``components.transfer.AgentConfig``, ``migration`` those of ``migration.Settings``.
    """
    require_tested_vllm()
    from vllm.config import KVTransferConfig

    connector = getattr(args.kv_transfer_config, "kv_connector", None)
    if connector != STOCK_CONNECTOR:
        _refuse("kv_transfer_config", args.kv_transfer_config, "migration brings its own KV connector")
    _refuse("worker_extension_cls", args.worker_extension_cls, "migration brings its own")
    if args.data_parallel_size > 1:
        raise ConfigError(f"data_parallel_size is {args.data_parallel_size}: start one worker for each replica instead")
    if args.pipeline_parallel_size > 1:
        raise ConfigError(
            f"pipeline_parallel_size is {args.pipeline_parallel_size}: requests cannot be migrated between pipelines; "
            "use tensor_parallel_size"
        )
    args.kv_transfer_config = KVTransferConfig(
        kv_connector="MigrationConnector",
        kv_connector_module_path=f"{_MODULE}.connector",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={"agent": agent, "migration": migration or {}},
    )
    args.worker_extension_cls = f"{_MODULE}.worker.WorkerExtension"
    args.scheduler_cls = _scheduler(args)
    if args.distributed_executor_backend is None:
        args.distributed_executor_backend = executor(args.tensor_parallel_size)


def _refuse(name: str, value: object, why: str) -> None:
    if value:
        raise ConfigError(f"{name} is {value!r}, but {why}: leave it out")


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
