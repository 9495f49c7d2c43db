# SPDX-License-Identifier: Apache-2.0
"""From a worker's configuration to its engine. Nothing is started here; raises ``ConfigError``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from components import env
from components.engine.protocol import Engine
from components.errors import ConfigError
from components.models import adapters
from components.serve.config import WorkerConfig, nearest


def build_engine(config: WorkerConfig, name: str) -> Engine:
    """The engine that the configuration asks for; ``name`` is that of its transfer agent."""
    agent: dict[str, Any] = {
        "name": name,
        **env.stores(),
        "advertise_host": config.advertise_host,
        "calibration": config.calibration,
    }
    return _paged(config, agent) if config.engine == "paged" else _vllm(config, agent)


def _vllm(config: WorkerConfig, agent: dict[str, Any]) -> Engine:
    from components.engine.vllm.engine import VLLMEngine, VLLMOptions

    engine_args: dict[str, Any] = {
        "model": config.model,
        "served_model_name": config.served_model_name or None,
        "max_model_len": config.max_model_len,
        "block_size": config.block_size,
        "dtype": config.dtype,
        "tensor_parallel_size": config.tensor_parallel_size,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "enable_prefix_caching": config.enable_prefix_caching,
        # On GPUs launching each kernel by itself takes several times as long as a step of CUDA graphs.
        "enforce_eager": not config.devices if config.enforce_eager is None else config.enforce_eager,
        "seed": config.seed,
        "kv_cache_memory_bytes": int(config.kv_memory_gib * (1 << 30)),
    }
    if config.lora_modules:
        engine_args |= {
            "enable_lora": True,
            "max_loras": min(len(config.lora_modules), config.max_num_seqs),
            "max_lora_rank": adapters.max_rank(config.lora_modules),
        }
    if not config.devices:
        # Without it, vLLM on CPU ignores the seeds of a batch in which not every request has one.
        engine_args["use_fp64_gumbel"] = True
    return VLLMEngine(
        VLLMOptions(
            engine_args | config.engine_args,
            agent,
            integrity=config.integrity,
            lease_s=config.lease_s,
            lora_modules=config.lora_modules,
        )
    )


def _paged(config: WorkerConfig, agent: dict[str, Any]) -> Engine:
    from components.engine.paged import PagedEngine, PagedOptions

    known = [field for field in PagedOptions.__dataclass_fields__ if field != "agent"]
    for key in config.engine_args:
        if key not in known:
            raise ConfigError(f"engine-args: the paged engine has no option {key!r}{nearest(key, known)}")
    options: dict[str, Any] = {
        "model": config.served_model_name or config.model,
        # Its KV is small: enough for every seat at full length.
        "num_blocks": -(-config.max_model_len // config.block_size) * config.max_num_seqs,
        "block_size": config.block_size,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens or 2048,
        "vocab_size": _vocab_size(config.model),
        "seed": config.seed,
        "prefix_caching": config.enable_prefix_caching,
        "integrity": config.integrity,
        "lease_s": config.lease_s,
    }
    return PagedEngine(PagedOptions(agent, **(options | config.engine_args)))


def _vocab_size(model: str) -> int:
    """Tokens of the model's tokenizer: the paged engine has no weights, but its clients read text."""
    path = Path(model) / "config.json"
    size = json.loads(path.read_bytes()).get("vocab_size") if path.is_file() else None
    if not isinstance(size, int):
        raise ConfigError(f"the paged engine needs a model folder whose config.json has vocab_size; {model} has none")
    return size
