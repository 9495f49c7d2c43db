# SPDX-License-Identifier: Apache-2.0
"""Checks, before the start, that there is memory for a plan's KV blocks, and shared memory.

One token of full attention takes ``2 * layers * KV heads * head size * bytes of the dtype`` (keys and values), split
over the tensor-parallel ranks, as in vLLM. Other models (MLA, sliding windows, states, a quantised KV cache) and names
without a folder are left to vLLM. Raises ``ConfigError``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import psutil

from components.config import ComponentConfig, WorkerConfig
from components.errors import ConfigError

GIB = 1 << 30
SHM = Path("/dev/shm")
_RANKS_GIB = 0.25
"""Queues between the ranks of one engine."""


def check(processes: list[tuple[str, ComponentConfig]]) -> None:
    """Check all. ``processes``: component name and configuration of each possible process on this host."""
    workers = [(name, config) for name, config in processes if isinstance(config, WorkerConfig)]
    for name, config in workers:
        _check_one_request(name, config)
    asked = sum(config.kv_memory_gib for _, config in workers if not config.devices)
    total = psutil.virtual_memory().total / GIB
    if asked > 0.8 * total:
        raise ConfigError(
            f"the workers ask for {asked:g} GiB of KV memory together, this host has {total:.0f} GiB: "
            "lower kv-memory-gib or replicas"
        )


def shared(processes: list[tuple[str, ComponentConfig]], folder: Path = SHM) -> str:
    """A warning when shared memory is too small, or empty.

    Engines with several ranks exchange each step through it and die when it is full. KV blocks take no room there.
    """
    workers = [config for _, config in processes if isinstance(config, WorkerConfig) and config.engine == "vllm"]
    wanted = sum(_RANKS_GIB for config in workers if max(config.ranks) > 1)
    try:
        space = os.statvfs(folder)
        free = space.f_bavail * space.f_frsize / GIB
    except OSError:
        free = 0.0
    if wanted <= free:
        return ""
    return (
        f"{folder} has {free:.2f} GiB free, engines of several ranks want {wanted:.3g} and may die without it: "
        "docker run --shm-size=2g (Kubernetes: an emptyDir of medium Memory at /dev/shm)"
    )


def _check_one_request(name: str, config: WorkerConfig) -> None:
    """The longest allowed request must fit."""
    size = bytes_per_token(config)
    if size is None or config.engine != "vllm":
        return
    blocks = -(-config.max_model_len // config.block_size)
    needed = blocks * config.block_size * size / GIB
    if needed > config.kv_memory_gib:
        raise ConfigError(
            f"{name}.kv-memory-gib = {config.kv_memory_gib:g} holds {int(config.kv_memory_gib * GIB / size)} tokens, "
            f"and max-model-len = {config.max_model_len}: give at least {needed:.3g}, or lower max-model-len"
        )


def bytes_per_token(config: WorkerConfig) -> float | None:
    """KV bytes of one token on each rank; ``None``: unknown."""
    try:
        model: dict[str, Any] = json.loads((Path(config.model) / "config.json").read_bytes())
        heads = model["num_attention_heads"]
        if _keeps_something_else(model) or "kv-cache-dtype" in config.engine_flags:
            return None
        kv_heads = model.get("num_key_value_heads") or heads
        size = model.get("head_dim") or model["hidden_size"] // heads
        # vLLM's default dtypes have two bytes.
        width = 4 if config.dtype in ("float32", "float") else 2
        share = max(1, kv_heads // min(config.ranks))
        return float(2 * model["num_hidden_layers"] * share * size * width)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keeps_something_else(model: dict[str, Any]) -> bool:
    """True when a layer of the model does not keep keys and values of all tokens in the model's dtype."""
    windows = model.get("sliding_window") and model.get("use_sliding_window") is not False
    others = set(model.get("layer_types") or ()) - {"full_attention"}
    states = any(mark in key for key in model for mark in ("mamba", "ssm_", "kv_lora_rank"))
    return bool(windows or others or states or (model.get("quantization_config") or {}).get("kv_cache_scheme"))
