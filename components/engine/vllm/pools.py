# SPDX-License-Identifier: Apache-2.0
"""vLLM's KV caches as pools: which axis counts blocks is read from vLLM's own plan, never guessed from a length.

Since vLLM 0.29 every layer's cache is a view (blocks, heads, tokens, content) of one storage; ``KVCacheTensor`` says
where its blocks lie. A view that is not where the plan puts it raises ``ConfigError`` with its shape. Called once, when
vLLM has made the caches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from components.errors import ConfigError
from components.transfer import KVPool

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheTensor


def pools_of(kv_caches: Mapping[str, torch.Tensor], kv_cache_config: KVCacheConfig) -> list[KVPool]:
    """One pool for each layer that has a cache of its own.

    Layers that use another one's are left out. Cache groups may overlay each other: a block number belongs to one group
    at a time, and means the same bytes of the storage whichever group that is.
    """
    pools: list[KVPool] = []
    for placed in kv_cache_config.kv_cache_tensors:
        for number, layer in enumerate(placed.layers):
            if layer not in kv_caches:
                raise ConfigError(f"vLLM plans a KV cache for layer {layer} and has made none")
            start = placed.offset + number * placed.layer_stride
            pools.append(_pool(layer, kv_caches[layer], kv_cache_config.num_blocks_of(placed), placed, start))
    known = {(pool.tensor.data_ptr(), pool.tensor.nbytes) for pool in pools}
    for layer, tensor in kv_caches.items():
        if (tensor.data_ptr(), tensor.nbytes) not in known:
            raise ConfigError(f"the KV cache of layer {layer}, of shape {tuple(tensor.shape)}, is not in vLLM's plan")
    return pools


def _pool(layer: str, tensor: torch.Tensor, num_blocks: int, placed: KVCacheTensor, start: int) -> KVPool:
    found = f"the KV cache of layer {layer} has shape {tuple(tensor.shape)} and strides {tensor.stride()}"
    if tensor.dim() != 4 or tensor.shape[0] % num_blocks:
        raise ConfigError(f"{found}: it is no view (blocks, heads, tokens, content) of {num_blocks} blocks")
    split = tensor.shape[0] // num_blocks
    stride = tensor.stride(0) * tensor.element_size() * split
    offset = tensor.data_ptr() - tensor.untyped_storage().data_ptr()
    if num_blocks > 1 and (stride, offset) != (placed.block_stride, start):
        raise ConfigError(
            f"{found}: its blocks are {stride} bytes apart from byte {offset} on, and vLLM plans {placed.block_stride} "
            f"from {start} on"
        )
    if split > 1:  # The attention kernel's blocks are parts of the manager's.
        tensor = tensor.view(num_blocks, split, *tensor.shape[1:])
    return KVPool(name=layer, tensor=tensor, num_blocks=num_blocks, block_dim=0)
