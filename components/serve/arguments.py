# SPDX-License-Identifier: Apache-2.0
"""Turns a component's keys into the command line and variables of Dynamo's program. Pure.

``PORT`` and ``SOCKET`` stand for values that are known only when a process starts: a free port, and the path of a
socket in a private folder. ``filled`` inserts them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from components import env
from components.config import FrontendConfig, WorkerConfig, dashed
from components.errors import ConfigError
from components.models import adapters
from components.serve.servers import free_port
from components.transfer.config import AgentConfig

PORT = "@PORT@"
SOCKET = "@SOCKET@"
_ALL_OF_A_GPU = 0.9
_WEIGHTS = {"overlap-score-credit": "router-kv-overlap-score-credit"}
"""Flags of the frontend with other names than their weights."""


def frontend(config: FrontendConfig, replica: int) -> list[str]:
    """Arguments of ``dynamo.frontend``."""
    given = {
        "http-host": config.host,
        "http-port": config.port + replica,
        "router-mode": config.router_mode,
        "migration-limit": config.migration_limit,
        "router-kv-events": config.kv_events,
        "router-replica-sync": config.replicas > 1 and config.router_mode == "kv" or None,
        "router-policy-config": config.router_policy_config or None,
        "router-session-affinity-ttl-secs": config.session_affinity_s,
        "active-decode-blocks-threshold": config.active_decode_blocks_threshold,
        "active-prefill-tokens-threshold": config.active_prefill_tokens_threshold,
        "active-prefill-tokens-threshold-frac": config.active_prefill_tokens_threshold_frac,
    }
    weights = {_WEIGHTS.get(name, f"router-{name}"): value for name, value in config.router_weights.items()}
    return list(_flags(given | weights | config.frontend_args))


def worker(config: WorkerConfig, mode: str, replica: int = 0) -> list[str]:
    """Arguments of ``components.worker``, as of ``dynamo.vllm``. ``mode``: agg, prefill or decode."""
    given: dict[str, Any] = {
        "model": config.model,
        "served-model-name": config.served_model_name or None,
        "disaggregation-mode": mode,
        "max-model-len": config.max_model_len,
        "block-size": config.block_size,
        "dtype": config.dtype,
        "tensor-parallel-size": config.ranks_of(replica),
        "max-num-seqs": config.max_num_seqs,
        "max-num-batched-tokens": config.max_num_batched_tokens,
        "enable-prefix-caching": config.enable_prefix_caching,
        "enforce-eager": eager(config),
        "seed": config.seed,
        "kv-cache-memory-bytes": int(config.kv_memory_gib * (1 << 30)),
        "dyn-tool-call-parser": config.tool_call_parser or None,
        "dyn-reasoning-parser": config.reasoning_parser or None,
    }
    if config.enable_prefix_caching:
        given["kv-events-config"] = {
            "publisher": "zmq",
            "topic": "kv-events",
            # These events contain prompts: they stay on this machine, with this user.
            "endpoint": f"ipc://{SOCKET}",
            "enable_kv_cache_events": True,
        }
    if config.sharing > 1:
        # Each takes its KV blocks anyway, but vLLM does not start where less memory than this is free.
        given["gpu-memory-utilization"] = round(_ALL_OF_A_GPU / config.sharing, 3)
    if not config.devices:
        # Without it vLLM on CPUs ignores the seeds of a batch unless every request has one.
        given["use-fp64-gumbel"] = True
    if config.lora_modules:
        given |= {
            "enable-lora": True,
            "max-loras": min(len(config.lora_modules), config.max_num_seqs),
            "max-lora-rank": adapters.max_rank(config.lora_modules),
        }
    return list(_flags(given | config.engine_flags))


def eager(config: WorkerConfig) -> bool:
    """Whether to run without CUDA graphs, by default only without GPUs: single launches take several times as long."""
    return not config.devices if config.enforce_eager is None else config.enforce_eager


def worker_environment(config: WorkerConfig, repeats: bool, planned: bool) -> dict[str, str]:
    """Settings of ``components.worker.settings``. ``repeats``: frontends repeat requests; ``planned``: the graph has a
    planner, which reads the metrics of each forward pass."""
    given = {
        "DYN_MIGRATE_HOST": config.advertise_host,
        "DYN_MIGRATE_LEASE_S": f"{config.lease_s:g}",
        "DYN_MIGRATE_DRAIN_S": f"{config.drain_grace_s:g}",
        "DYN_MIGRATE_INTEGRITY": config.integrity,
        "DYN_MIGRATE_REPEATS": "1" if repeats else "0",
    }
    if config.transfer:
        given["DYN_MIGRATE_TRANSFER"] = json.dumps(AgentConfig.tuned(config.transfer))
    if config.lora_modules:
        given |= {"DYN_LORA_ENABLED": "true", "DYN_MIGRATE_LORA_MODULES": json.dumps(config.lora_modules)}
    if planned:
        given["DYN_FORWARDPASS_METRIC_PORT"] = PORT
    if config.engine == "vllm" and eager(config):
        # Even then vLLM compiles a helper of its log-probabilities: 20 s at the first request with them.
        given[env.TORCH_COMPILE_OFF.name] = env.TORCH_COMPILE_OFF.read()
    return given


def filled(command: Sequence[str], environment: Mapping[str, str], socket: str) -> tuple[list[str], dict[str, str]]:
    """Command line and variables with all values inserted."""
    port = str(free_port())

    def fill(text: str) -> str:
        return text.replace(PORT, port).replace(SOCKET, socket)

    return [*map(fill, command)], {name: fill(value) for name, value in environment.items()}


def _flags(given: Mapping[str, Any]) -> Iterator[str]:
    for key, value in given.items():
        name = dashed(key)
        if value is None:
            continue
        if isinstance(value, bool):
            yield f"--{name}" if value else f"--no-{name}"
        elif isinstance(value, dict):
            yield from (f"--{name}", json.dumps(value))
        elif isinstance(value, list):
            yield from (f"--{name}", *map(str, value))
        elif isinstance(value, (str, int, float)):
            # Joined with "=": a value may begin with a dash.
            yield f"--{name}={value}"
        else:
            raise ConfigError(f"{key} = {value!r} cannot be written as an argument: give text, a number, on or off")
