# SPDX-License-Identifier: Apache-2.0
"""vLLM's KV caches as pools. The block axis comes from vLLM's plan, never from an axis's length.

Since vLLM 0.29 every layer's cache is a view (blocks, heads, tokens, content) of one storage, without heads where all
share one (MLA); ``KVCacheTensor`` has the place of its blocks. A view that is not at that place raises
``ConfigError`` with its shape. Layers with state have several views of a block, which counts as plain bytes, and does
not divide into heads. Called once, after vLLM has made the caches.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec, MLAAttentionSpec

from components.engine.vllm.compat.groups import only_movable
from components.errors import ConfigError
from components.transfer import KVPool

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheTensor


logger = logging.getLogger(__name__)

Caches = Mapping[str, torch.Tensor | list[torch.Tensor]]
HeadsOf = Callable[[KVCacheSpec], int]


def pools_to_register(kv_caches: Caches, kv_cache_config: KVCacheConfig, heads: HeadsOf) -> list[KVPool]:
    """``pools_of``; for a model whose requests cannot move and whose caches are unreadable, one empty pool."""
    try:
        return pools_of(kv_caches, kv_cache_config, heads)
    except ConfigError as error:
        if only_movable(kv_cache_config):
            raise
        logger.warning("requests of this model stay on their worker: %s", error)
        return [KVPool(name="none", tensor=torch.zeros(1, 1), num_blocks=1, block_dim=0)]


def heads_of(vllm_config: VllmConfig) -> HeadsOf:
    """Tells the number of KV heads over all ranks by a layer's cache; 0: its blocks do not divide into heads."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    ranks, total = parallel.tensor_parallel_size, model.get_total_num_kv_heads()

    def heads(spec: KVCacheSpec) -> int:
        if not isinstance(spec, AttentionSpec) or parallel.decode_context_parallel_size > 1:
            return 0
        if spec.max_tp_shards == 1:
            return 1
        if isinstance(spec, MLAAttentionSpec) or spec.num_heads != spec.num_kv_heads:
            return 0
        if spec.num_kv_heads > 1 or ranks == 1:
            return spec.num_kv_heads * ranks
        # Each rank has one head; neighbours may have the same.
        return total if total <= ranks else 0

    return heads


def pools_of(kv_caches: Caches, kv_cache_config: KVCacheConfig, heads: HeadsOf = lambda spec: 0) -> list[KVPool]:
    """One pool for each layer with its own cache.

    Layers that use another layer's cache are left out. Cache groups may overlap: a block number belongs to one group
    at a time and names the same bytes of the storage in every group.
    """
    pools: list[KVPool] = []
    specs = specs_of(kv_cache_config)
    for placed in kv_cache_config.kv_cache_tensors:
        for number, layer in enumerate(placed.layers):
            if layer not in kv_caches:
                raise ConfigError(f"vLLM plans a KV cache for layer {layer} and has made none")
            start = placed.offset + number * placed.layer_stride
            blocks, cache = kv_cache_config.num_blocks_of(placed), kv_caches[layer]
            if isinstance(cache, torch.Tensor):
                pools.append(_pool(layer, cache, blocks, placed, start, heads(specs[layer])))
            else:
                pools.append(_pages(layer, cache[0], blocks, placed, start, specs[layer].page_size_bytes))
    known = {_place(kv_caches[layer]) for placed in kv_cache_config.kv_cache_tensors for layer in placed.layers}
    for layer, cache in kv_caches.items():
        if _place(cache) not in known:
            shapes = [tuple(tensor.shape) for tensor in _views(cache)]
            raise ConfigError(f"the KV cache of layer {layer}, of shape {shapes}, is not in vLLM's plan")
    return pools


def _views(cache: torch.Tensor | list[torch.Tensor]) -> list[torch.Tensor]:
    return [cache] if isinstance(cache, torch.Tensor) else cache


def _place(cache: torch.Tensor | list[torch.Tensor]) -> tuple[tuple[int, int], ...]:
    return tuple((tensor.data_ptr(), tensor.nbytes) for tensor in _views(cache))


def specs_of(kv_cache_config: KVCacheConfig) -> dict[str, KVCacheSpec]:
    """The kind of cache of each layer."""
    specs = {}
    for group in kv_cache_config.kv_cache_groups:
        each = getattr(group.kv_cache_spec, "kv_cache_specs", {})
        for layer in group.layer_names:
            specs[layer] = each.get(layer, group.kv_cache_spec)
    return specs


def _pages(
    layer: str, tensor: torch.Tensor, num_blocks: int, placed: KVCacheTensor, start: int, page_size: int
) -> KVPool:
    """The blocks, as bytes, of a layer that keeps states."""
    offset = tensor.data_ptr() - tensor.untyped_storage().data_ptr()
    if offset != start:
        raise ConfigError(f"the states of layer {layer} begin at byte {offset}, and vLLM plans {start}")
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    pages = torch.as_strided(flat, (num_blocks, page_size), (placed.block_stride, 1), start)
    return KVPool(name=layer, tensor=pages, num_blocks=num_blocks, block_dim=0)


def _pool(layer: str, tensor: torch.Tensor, num_blocks: int, placed: KVCacheTensor, start: int, heads: int) -> KVPool:
    found = f"the KV cache of layer {layer} has shape {tuple(tensor.shape)} and strides {tensor.stride()}"
    if tensor.dim() not in (3, 4) or tensor.shape[0] % num_blocks:
        raise ConfigError(f"{found}: it is no view (blocks, heads, tokens, content) of {num_blocks} blocks")
    split = tensor.shape[0] // num_blocks
    stride = tensor.stride(0) * tensor.element_size() * split
    offset = tensor.data_ptr() - tensor.untyped_storage().data_ptr()
    if num_blocks > 1 and (stride, offset) != (placed.block_stride, start):
        raise ConfigError(
            f"{found}: its blocks are {stride} bytes apart from byte {offset} on, and vLLM plans {placed.block_stride} "
            f"from {start} on"
        )
    if split > 1:  # A block of the manager consists of several blocks of the attention kernel.
        tensor = tensor.view(num_blocks, split, *tensor.shape[1:])
    # MLA's views have no axis for their one head.
    axis = tensor.dim() - 3 if tensor.dim() - (split > 1) == 4 else None
    return KVPool(name=layer, tensor=tensor, num_blocks=num_blocks, block_dim=0, heads=heads, head_dim=axis)
