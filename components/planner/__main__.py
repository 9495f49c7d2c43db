# SPDX-License-Identifier: Apache-2.0
"""Runs Dynamo's planner: ``python -m components.planner``. It writes the planner's file from this component's keys.

The planner runs with ``environment: virtual``. With ``decode-workers`` or ``prefill-workers``, ``dynamo serve`` carries
out its numbers of workers (components/serve/scale.py); without them it is advisory: numbers are logged, and only
migrations are carried out. ``planner-args`` overrides any key of the planner's file.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from components import process
from components.config import PlannerConfig, load_component_config
from components.errors import ConfigError
from planner_hooks import perf_model
from planner_hooks.config import load


def planner_file(config: PlannerConfig, namespace: str) -> dict[str, Any]:
    """Keys of Dynamo 1.6's ``PlannerConfig``."""
    bounds = {"decode": config.decode_workers, "prefill": config.prefill_workers}
    shared = {
        "module": "planner_hooks.plugin",
        "priority": 5,
        "needs": ["observations.fpm", "observations.workers"],
    }
    arguments = {"policy_file": config.policy_file}
    plugins = [
        shared | {"class": "MigrationPlugin", "plugin_id": "migration", "plugin_type": "propose", "kwargs": arguments},
        shared
        | {"class": "ScaleDownPlugin", "plugin_id": "scale-down", "plugin_type": "constrain"}
        | {
            "kwargs": arguments
            | {f"{role}_workers": list(b) for role, b in bounds.items() if b is not None}
            | {"started": config.started}
        },
    ]
    most = sum(b[1] for b in bounds.values() if b is not None)
    return {
        "environment": "virtual",
        "namespace": namespace,
        "backend": "vllm",
        "mode": "disagg",
        "model_name": config.served_model_name or config.model,
        "prefill_engine_num_gpu": 1,
        "decode_engine_num_gpu": 1,
        "optimization_target": "load",
        "prefill_scale_up_queue_tokens": 100_000,
        "prefill_scale_down_queue_tokens": 1,
        "decode_scale_up_kv_rate": 100 * config.scale_up_usage,
        "decode_scale_down_kv_rate": 100 * config.scale_down_usage,
        "max_gpu_budget": most or -1,
        "advisory": not most,
        "load_adjustment_interval_seconds": config.interval_s,
        "scheduling": {"scale_interval_seconds": config.interval_s},
        "pre_deployment_sweeping_mode": "none",
        "live_dashboard_port": 0,
        # The default is one fixed port for each host, which a second planner could not have.
        "control_api_port": 0,
        "report_interval_hours": None,
        "plugin_registration": {
            "auth": {"trusted_sources": ["allow_unauthenticated"]},
            "in_process_plugins": plugins,
        },
    } | config.planner_args


def main() -> None:
    """Run Dynamo's planner in this process."""
    config = load_component_config(PlannerConfig)
    file = planner_file(config, process.namespace())
    if file["optimization_target"] == "sla" and not perf_model.installed():
        raise ConfigError(
            "Planner.planner-args: optimization_target sla needs the package aisimulate_core, which is not installed: "
            "install it from NVIDIA, or leave the target as it is (load)"
        )
    perf_model.stand_in()
    os.environ.setdefault("DYN_EVENT_PLANE", "zmq")
    # The planner renews its watches continually, and Dynamo's store logs each one as an error.
    # Read by Dynamo at its import.
    os.environ["DYN_LOG"] = os.environ.get("DYN_LOG", "warn") + ",dynamo_runtime::storage::kv=off"
    try:
        from dynamo.planner import __main__ as planner
    except ImportError as error:
        raise ConfigError(f"Dynamo's planner cannot be imported ({error}): install the extra 'planner'") from error
    load(Path(config.policy_file))  # A wrong file ends here with one line, before the planner's start.
    sys.argv = ["planner", "--config", json.dumps(file)]
    vars(planner)["init_planner"] = functools.partial(_while_in_etcd, planner.init_planner)
    planner.main()  # type: ignore[no-untyped-call]


async def _while_in_etcd(init_planner: Callable[..., Coroutine[Any, Any, None]], runtime: Any, *args: Any) -> None:
    """Dynamo's ``init_planner``, until the runtime has lost its lease: the planner would go on and see no worker."""
    cut_off = asyncio.ensure_future(process.until_cut_off(runtime, "planner"))
    running = asyncio.ensure_future(init_planner(runtime, *args))
    await asyncio.wait((cut_off, running), return_when=asyncio.FIRST_COMPLETED)
    if running.done():
        return running.result()
    process.end_cut_off("planner")


if __name__ == "__main__":
    process.run_blocking(main)
