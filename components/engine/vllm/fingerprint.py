# SPDX-License-Identifier: Apache-2.0
"""One hash of everything that must be equal in two engines that exchange KV blocks.

That is everything that changes a value in a block or a token computed from it: the model and its weights, dtypes,
quantization, scales of a quantised KV cache, adapters, block layout, attention backend, model runner, tokenizer and
defaults of sampling. The place of the weights is not part of it, and neither is the tensor-parallel size (blocks divide
into heads), unless the model has caches that do not divide, or random weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from components import versions
from components.engine.vllm.pools import specs_of
from components.models import tokens
from components.models.weights import digest
from components.transfer import KVPool
from components.transfer.regions import regions_of

if TYPE_CHECKING:
    from vllm.config import LoadConfig, ModelConfig, ParallelConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec


_OF_A_RANK = ("num_kv_heads", "page_size_padded")
"""Fields of a cache's kind that depend on the tensor-parallel size."""


def fingerprint(
    vllm_config: VllmConfig, plan: KVCacheConfig, pools: Sequence[KVPool], runner: str, adapters: str, weights: str
) -> str:
    """``plan`` is vLLM's plan of its KV caches, ``weights`` the digest of ``weights_of``.

    ``runner`` names the model runner; ``adapters`` is a digest, empty without adapters.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    config = model.hf_config.to_dict()
    config.pop("_name_or_path", None)
    dummy = vllm_config.load_config.load_format == "dummy"
    of_all_sizes = all(pool.heads for pool in pools)
    regions = [] if of_all_sizes else [(r.order, [s.length for s in r.segments]) for r in regions_of(pools)]
    facts = {
        "model": config,
        "weights": weights,
        # Random weights come from the device's generator.
        "device": pools[0].tensor.device.type if dummy else "",
        "runner": runner,
        "dtype": str(model.dtype),
        # The second: of weights that are quantised while they are loaded.
        "quantization": [str(model.quantization), str(model.quantization_config)],
        "cache_dtype": str(cache.cache_dtype),
        "scales": _scales(vllm_config, plan),
        "block_size": cache.block_size,
        # Random weights of a rank are no part of those of a smaller size.
        "tp": 0 if of_all_sizes and not dummy else vllm_config.parallel_config.tensor_parallel_size,
        "context_parallel": _context_parallel(vllm_config.parallel_config),
        "adapters": adapters,
        "vllm": versions.series(versions.installed("vllm")),
        "attention": _attention(vllm_config, plan),
        "long_rope": _long_rope(model),
        "sampling": _sampling(vllm_config),
        "tokenizer": _tokenizer(vllm_config),
        "drafts": _drafts(vllm_config),
        "logits_processors": [str(model.logits_processors), [each.value for each in entry_points(group=_PROCESSORS)]],
        "groups": [group.layer_names for group in plan.kv_cache_groups],
        "kinds": {layer: _kind(spec, of_all_sizes) for layer, spec in specs_of(plan).items()},
        "layout": plan.kv_cache_layout,
        "pools": [(pool.name, str(pool.tensor.dtype), pool.heads, _shape(pool)) for pool in pools],
        "regions": regions,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _context_parallel(parallel: ParallelConfig) -> list[int]:
    """Which tokens of a block a rank has. The interleaving counts only where tokens are spread."""
    sizes = [parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size]
    return [*sizes, parallel.cp_kv_cache_interleave_size] if max(sizes) > 1 else sizes


_PROCESSORS = "vllm.logits_processors"
"""Installed packages that vLLM takes logits processors from."""
_SCALES = ("_k_scale", "_v_scale", "_q_scale", "_prob_scale")


def _scales(vllm_config: VllmConfig, plan: KVCacheConfig) -> list[object]:
    """What each layer multiplies a quantised KV cache with: scales of the checkpoint, or 1.

    Those that vLLM computes for each token and head are in the blocks.
    """
    layers: dict[str, Any] = vllm_config.compilation_config.static_forward_context
    names = [name for group in plan.kv_cache_groups for name in group.layer_names if name in layers]
    found = ([getattr(layers[name], scale, None) for scale in _SCALES] for name in names)
    return [[scale if scale is None else scale.tolist() for scale in scales] for scales in found]


def _attention(vllm_config: VllmConfig, plan: KVCacheConfig) -> list[object]:
    """What writes each layer's blocks. On CPUs equal shapes hold other bytes with other instruction sets (AMX)."""
    layers: dict[str, Any] = vllm_config.compilation_config.static_forward_context
    found = (layers.get(name) for group in plan.kv_cache_groups for name in group.layer_names)
    backends = [(getattr(layer, "attn_backend", None), getattr(layer, "isa", "")) for layer in found]
    return [[backend.get_name() if backend is not None else "", isa] for backend, isa in backends]


def _long_rope(model: ModelConfig) -> bool:
    """Whether vLLM turns keys by the model's long factors: it does so for all lengths where long ones are allowed."""
    rope: dict[str, Any] = getattr(model.hf_text_config, "rope_parameters", None) or {}
    begin = rope.get("original_max_position_embeddings")
    return rope.get("rope_type") == "longrope" and begin is not None and model.max_model_len > begin


def _sampling(vllm_config: VllmConfig) -> list[object]:
    """What turns logits into tokens and log-probabilities beside a request's parameters, and their defaults."""
    model, load, mark = vllm_config.model_config, vllm_config.load_config, vllm_config.watermark_config
    own = model.generation_config in ("auto", "vllm")
    source = (model.hf_config_path or model.model, model.revision) if own else (model.generation_config, None)
    return [
        model.generation_config if own else "",
        tokens.digest(tokens.GENERATION, *source, load.download_dir),
        model.override_generation_config,
        model.logprobs_mode,
        model.use_fp64_gumbel,
        None if mark is None else vars(mark),
    ]


def _tokenizer(vllm_config: VllmConfig) -> list[object]:
    """Of grammars and ends of answers; and what makes features of images."""
    model, media = vllm_config.model_config, vllm_config.model_config.multimodal_config
    files = tokens.digest(
        tokens.TOKENIZER, model.tokenizer, model.tokenizer_revision, vllm_config.load_config.download_dir
    )
    return [str(model.tokenizer_mode), files, None if media is None else media.mm_processor_kwargs]


def _drafts(vllm_config: VllmConfig) -> list[object]:
    """The tokens of a seed depend on drafts, and a drafter has KV of its own."""
    drafts = vllm_config.speculative_config
    if drafts is None:
        return []
    drafter = drafts.draft_model_config
    weights = "" if drafter is None else _digest(drafter, drafts.draft_load_config or vllm_config.load_config)
    return [drafts.method, drafts.num_speculative_tokens, drafts.rejection_sample_method, weights]


def _kind(spec: KVCacheSpec, of_all_sizes: bool) -> str:
    """All facts about a layer's cache, or those that are the same for all tensor-parallel sizes."""
    if not of_all_sizes:
        return repr(spec)
    facts = {field.name: getattr(spec, field.name) for field in fields(spec) if field.name not in _OF_A_RANK}
    return f"{type(spec).__name__} {facts}"


def _shape(pool: KVPool) -> list[int]:
    """The axes of a head, or of a block that does not divide."""
    without = (pool.block_dim, pool.head_dim if pool.heads else None)
    return [length for axis, length in enumerate(pool.tensor.shape) if axis not in without]


def weights_of(vllm_config: VllmConfig) -> str:
    """Digest of the weights that an engine loads."""
    return _digest(vllm_config.model_config, vllm_config.load_config)


def _digest(model: ModelConfig, load: LoadConfig) -> str:
    # vLLM keeps the address of weights in an object store apart from the configuration's.
    source = model.model_weights or model.model
    return digest(source, str(load.load_format), model.revision, load.download_dir)
