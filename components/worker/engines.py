# SPDX-License-Identifier: Apache-2.0
"""Makes the paged engine of a worker's configuration, without starting it. Raises ``ConfigError``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from components import env
from components.config import WorkerConfig, nearest
from components.engine.paged import PagedEngine, PagedOptions
from components.errors import ConfigError
from components.transfer.config import AgentConfig


def build_engine(config: WorkerConfig, name: str) -> PagedEngine:
    """The configured engine; ``name`` is that of its transfer agent."""
    agent: dict[str, Any] = {
        "name": name,
        **env.stores(),
        **AgentConfig.tuned(config.transfer),
        "advertise_host": config.advertise_host,
    }
    known = [field for field in PagedOptions.__dataclass_fields__ if field != "agent"]
    for key in config.engine_args:
        if key not in known:
            raise ConfigError(f"engine-args: the paged engine has no option {key!r}{nearest(key, known)}")
    options: dict[str, Any] = {
        "model": config.served_model_name or config.model,
        # KV of this engine is small: it has enough for every seat at full length.
        "num_blocks": -(-config.max_model_len // config.block_size) * config.max_num_seqs,
        "block_size": config.block_size,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens or 2048,
        "vocab_size": _vocab_size(config.model),
        "seed": config.seed,
        "integrity": config.integrity,
        "lease_s": config.lease_s,
    }
    return PagedEngine(PagedOptions(agent, **(options | config.engine_args)))


def _vocab_size(model: str) -> int:
    """Size of the tokenizer's vocabulary: the paged engine has no weights, but its clients read text."""
    path = Path(model) / "config.json"
    size = json.loads(path.read_bytes()).get("vocab_size") if path.is_file() else None
    if not isinstance(size, int):
        raise ConfigError(f"the paged engine needs a model folder whose config.json has vocab_size; {model} has none")
    return size
