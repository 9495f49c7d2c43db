# SPDX-License-Identifier: Apache-2.0
"""vLLM's plan and allocation of KV caches as pools: every layout, and refusals."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from components.engine.vllm.pools import heads_of, pools_of, pools_to_register
from components.errors import ConfigError
from components.transfer import SharedZeros
from components.transfer.data.shared import shared_storages
from components.transfer.heads import Rank
from components.transfer.layout import block_bytes
from components.transfer.regions import regions_of, storages_of
from components.transfer.shares import divided

vllm = pytest.importorskip("vllm.v1.kv_cache_interface")
LAYOUTS = [layout.name for layout in vllm.KVCacheLayout]
LAYERS, BLOCKS, HEADS, TOKENS, SIZE = 3, 6, 2, 32, 64
PAGE = HEADS * TOKENS * 2 * SIZE * 2


def attention(kind: str = "FullAttentionSpec", **more: Any) -> Any:
    sizes = {"block_size": TOKENS, "num_kv_heads": HEADS, "head_size": SIZE, "dtype": torch.bfloat16}
    return getattr(vllm, kind)(**sizes | more)


def plan(layout: str, *specs: Any) -> Any:
    """Three layers for each of the groups, which overlay each other, as vLLM places them."""
    groups, tensors = [], []
    page = max(spec.page_size_bytes for spec in specs)
    outermost = vllm.KVCacheLayout[layout].is_block_outermost
    for number, spec in enumerate(specs):
        names = [f"model.layers.{number * LAYERS + n}.attn" for n in range(LAYERS)]
        fixed = (None, LAYERS * page if outermost else None, None, None, None)
        strides = vllm.compute_layout_strides(spec, BLOCKS, LAYERS, vllm.KVCacheLayout[layout], fixed_strides=fixed)
        tensors.append(vllm.KVCacheTensor(LAYERS * BLOCKS * page, names, strides[0], strides[1]))
        groups.append(vllm.KVCacheGroupSpec(names, spec))
    return vllm.KVCacheConfig(BLOCKS, tensors, groups)


def whole(spec: Any) -> int:
    """Nothing divides."""
    return 0


def caches(config: Any, layout: str, kernel_block: int = TOKENS) -> dict[str, torch.Tensor]:
    from vllm.v1.worker.utils import allocate_kv_cache

    sizes = [kernel_block] * len(config.kv_cache_groups)
    made: dict[str, torch.Tensor] = allocate_kv_cache(config, torch.device("cpu"), vllm.KVCacheLayout[layout], sizes)
    return made


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_one_storage_and_blocks_of_the_planned_size(layout: str) -> None:
    config = plan(layout, attention())
    made = caches(config, layout)
    made["model.layers.9.attn"] = made["model.layers.1.attn"]  # It uses the cache of another layer.
    pools = pools_of(made, config)
    assert [pool.name for pool in pools] == config.kv_cache_tensors[0].layers
    assert block_bytes(regions_of(pools)) == LAYERS * PAGE
    assert [span.size for span in storages_of(pools)] == [LAYERS * BLOCKS * PAGE]


def test_blocks_that_the_kernel_splits_are_moved_whole() -> None:
    config = plan("LBHNC", attention())
    pools = pools_of(caches(config, "LBHNC", kernel_block=8), config)
    assert pools[0].tensor.shape == (BLOCKS, 4, HEADS, 8, 2 * SIZE)
    assert [s.length for region in regions_of(pools) for s in region.segments] == [PAGE] * LAYERS


@pytest.mark.parametrize("layout", ["LBNHC", "BLNHC"])
def test_groups_over_the_same_bytes_are_moved_once(layout: str) -> None:
    state = vllm.MambaSpec(block_size=TOKENS, shapes=((3, 5), (7,)), dtypes=(torch.float32,) * 2, page_size_padded=PAGE)
    config = plan(layout, attention(), attention("SlidingWindowSpec", sliding_window=64), state)
    pools = pools_of(caches(config, layout), config)
    assert len(pools) == 3 * LAYERS
    assert block_bytes(regions_of(pools)) == LAYERS * PAGE


def test_caches_are_in_shared_memory_with_all_their_views() -> None:
    config = plan("LBHNC", attention(block_size=256))
    with SharedZeros():
        made = caches(config, "LBHNC", kernel_block=16)
    pools = pools_of(made, config)
    made["model.layers.2.attn"][16 * 4 + 1] = 1.5
    assert bool((pools[2].tensor[4, 1] == 1.5).all()) and not bool(pools[2].tensor[4, 0].any())
    [shared] = shared_storages(pools)
    assert shared.size == config.kv_cache_tensors[0].size


def test_caches_that_are_not_where_the_plan_puts_them_are_refused() -> None:
    config = plan("LBHNC", attention())
    made = caches(config, "LBHNC")
    first = "model.layers.0.attn"
    shape = r"shape \(6, 2, 32, 128\)"
    with pytest.raises(ConfigError, match=rf"layers.0.attn has {shape}.*vLLM plans"):
        pools_of(made | {first: made["model.layers.1.attn"]}, config)
    with pytest.raises(ConfigError, match=r"shape \(2, 6, 32, 128\).*no view \(blocks, heads, tokens, content\)"):
        pools_of(made | {first: made[first].transpose(0, 1)}, config)
    with pytest.raises(ConfigError, match=r"shape \(6, 6, 4, 8, 32\)"):  # No telling which six are the blocks.
        pools_of(made | {first: torch.zeros(6, 6, 4, 8, 32)}, config)
    with pytest.raises(ConfigError, match=r"layers.8.attn, of shape \[\(6, 2, 32, 128\)\], is not in vLLM's plan"):
        pools_of(made | {"model.layers.8.attn": made[first].clone()}, config)
    with pytest.raises(ConfigError, match="has made none"):
        pools_of({name: cache for name, cache in made.items() if name != first}, config)
    wider = replace(config.kv_cache_tensors[0], block_stride=2 * PAGE)
    with pytest.raises(ConfigError, match="vLLM plans 32768"):
        pools_of(made, replace(config, kv_cache_tensors=[wider]))


def test_a_model_whose_requests_stay_is_served_whatever_its_caches_are() -> None:
    """Rings, host memory, other numbers of blocks: nobody reads them."""
    config = plan("LBHNC", attention(), attention("CrossAttentionSpec"))
    made = caches(config, "LBHNC")
    strange = made | {config.kv_cache_groups[1].layer_names[0]: torch.zeros(2, 6, 4, 8, 32)}
    (pool,) = pools_to_register(strange, config, whole)
    assert (pool.name, pool.num_blocks) == ("none", 1)
    with pytest.raises(ConfigError):
        pools_to_register(
            made | {"model.layers.0.attn": torch.zeros(2, 6, 4, 8, 32)}, plan("LBHNC", attention()), whole
        )


def test_layers_with_states_are_taken_as_the_bytes_of_their_blocks() -> None:
    spec = attention()
    state = vllm.MambaSpec(
        shapes=((3, 8), (4, 16)),
        dtypes=(torch.bfloat16, torch.float32),
        block_size=TOKENS,
        page_size_padded=spec.page_size_bytes,
    )
    config = plan("LBHNC", spec, state)
    made: Any = caches(config, "LBHNC")
    for layer in config.kv_cache_groups[1].layer_names:
        # As the model runner gives them: a view for each state.
        made[layer] = [made[layer][..., :48], made[layer][..., 48:]]
    pools = pools_of(made, config)
    assert block_bytes(regions_of(pools)) == LAYERS * PAGE
    assert [pool.tensor.shape for pool in pools[LAYERS:]] == [(BLOCKS, PAGE)] * LAYERS


@pytest.mark.parametrize(
    ("spec", "ranks", "total", "heads"),
    [
        (attention(), 1, 2, 2),
        (attention(), 4, 8, 8),
        (attention(num_kv_heads=1), 1, 1, 1),
        (attention(num_kv_heads=1), 4, 4, 4),
        (attention(num_kv_heads=1), 8, 2, 2),
        (attention(num_kv_heads=1), 2, 8, 0),
        (attention("SlidingWindowSpec", sliding_window=64), 2, 4, 4),
        (attention("MLAAttentionSpec", num_kv_heads=1, max_tp_shards=1), 4, 16, 1),
        (attention("MLAAttentionSpec", num_kv_heads=1), 4, 16, 0),
        (attention(num_head_slots=2 * HEADS), 2, 4, 0),
        (vllm.MambaSpec(block_size=TOKENS, shapes=((3, 5),), dtypes=(torch.float32,)), 2, 4, 0),
    ],
)
def test_the_heads_of_all_ranks_follow_from_those_of_one(spec: Any, ranks: int, total: int, heads: int) -> None:
    """A layer with fewer heads than the model, of which each rank has one, could have any number."""
    config: Any = SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks, decode_context_parallel_size=1),
        model_config=SimpleNamespace(get_total_num_kv_heads=lambda: total),
    )
    assert heads_of(config)(spec) == heads


@pytest.mark.parametrize("kernel_block", [TOKENS, 8])
@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC"])
def test_blocks_divide_into_the_heads_of_vllm_s_views(layout: str, kernel_block: int) -> None:
    config = plan(layout, attention(), attention("SlidingWindowSpec", sliding_window=64))
    pools = pools_of(caches(config, layout, kernel_block), config, lambda spec: 2 * HEADS)
    assert {pool.tensor.shape[pool.head_dim] for pool in pools if pool.head_dim is not None} == {HEADS}
    (one, *_) = found = divided(pools, regions_of(pools), Rank(1, 2))
    # Both groups are over the same bytes.
    assert len(found) == LAYERS and one.count == HEADS
