# SPDX-License-Identifier: Apache-2.0
"""One hash of everything that must be equal in two engines that exchange KV blocks.

That is everything that changes a value in a block or a token computed from it: the model and its weights, dtypes,
quantization, adapters, block layout and model runner. The place of the weights is not part of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from components.models.weights import digest
from components.transfer import KVPool
from components.transfer.regions import regions_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


def fingerprint(
    vllm_config: VllmConfig, plan: KVCacheConfig, pools: Sequence[KVPool], runner: str, adapters: str, weights: str
) -> str:
    """``plan`` is vLLM's plan of its KV caches, ``weights`` the digest of ``weights_of``.

    ``runner`` names the model runner; ``adapters`` is a digest, empty without adapters.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    config, drafts = model.hf_config.to_dict(), vllm_config.speculative_config
    config.pop("_name_or_path", None)
    facts = {
        "model": config,
        "weights": weights,
        # Random weights come from the device's generator.
        "device": pools[0].tensor.device.type if vllm_config.load_config.load_format == "dummy" else "",
        "runner": runner,
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "cache_dtype": str(cache.cache_dtype),
        "block_size": cache.block_size,
        "tp": vllm_config.parallel_config.tensor_parallel_size,
        "adapters": adapters,
        # The tokens of a seed depend on drafts.
        "drafts": [drafts.method, drafts.num_speculative_tokens] if drafts is not None else [],
        "logits_processors": str(model.logits_processors),
        "groups": [(repr(group.kv_cache_spec), group.layer_names) for group in plan.kv_cache_groups],
        "pools": [(pool.name, str(pool.tensor.dtype), list(pool.tensor.shape[1:])) for pool in pools],
        "regions": [(r.order, [segment.length for segment in r.segments]) for r in regions_of(pools)],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def weights_of(vllm_config: VllmConfig) -> str:
    """Digest of the weights that an engine loads."""
    model, load = vllm_config.model_config, vllm_config.load_config
    # vLLM keeps the address of weights in an object store apart from the configuration's.
    source = model.model_weights or model.model
    return digest(source, str(load.load_format), model.revision, load.download_dir)
