# SPDX-License-Identifier: Apache-2.0
"""vLLM's KV cache groups: the blocks of a request that a group still needs, and the kinds of groups that can move.

All groups use one pool of blocks, and each has its own block table for every request, by position. vLLM's null block
stands for blocks that a window has left, always at the front.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm.v1.core.single_type_kv_cache_manager import (
    ChunkedLocalAttentionManager,
    FullAttentionManager,
    MambaManager,
    SingleTypeKVCacheManager,
    SlidingWindowManager,
)
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowMLASpec,
    SlidingWindowSpec,
)

from components.engine.groups import Table

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.kv_cache_interface import KVCacheConfig

_MOVED = (FullAttentionManager, SlidingWindowManager, ChunkedLocalAttentionManager, MambaManager)
"""Kinds whose blocks are written once from front to back and freed at the front, or that keep a state at the end."""
_MOVED_SPECS = (
    FullAttentionSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    SlidingWindowMLASpec,
    ChunkedLocalAttentionSpec,
    MambaSpec,
)
_STATES = ("align", "none")
"""Modes of vLLM's state cache in which a request without a step in flight has its state in its last block."""


class Group:
    """One group."""

    def __init__(self, manager: SingleTypeKVCacheManager, sparse: bool) -> None:
        self._manager = manager
        self.block_size = manager.block_size
        self.state = isinstance(manager, MambaManager)
        """True for one block that every step writes, which is copied when the request is frozen."""
        self.windowed = type(manager) is not FullAttentionManager
        self.check_all = sparse and self.windowed
        """True when the prefix cache drops middle blocks before the last ones, so that the last ones prove nothing."""

    def first_needed(self, num_tokens: int) -> int:
        """Position of the first block that the token behind ``num_tokens`` reads."""
        if not self.windowed:
            return 0
        return max(0, self._manager.get_num_skipped_tokens(num_tokens)) // self.block_size

    def blocks_of(self, num_tokens: int) -> int:
        """Number of positions of ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def place_state(self, vllm_id: str, num_tokens: int) -> bool:
        """Replace a request's blocks by one new block for its state after ``num_tokens``.

        As vLLM does for a load beside its steps. False without room.
        """
        self._manager.free(vllm_id)
        if not num_tokens:
            return True
        if not self._manager.block_pool.get_num_free_blocks():
            return False
        self._manager.add_local_computed_blocks(vllm_id, [], 0, num_tokens)
        self._manager.allocate_external_computed_blocks(vllm_id, 0, num_tokens)
        self._manager.allocate_new_blocks(vllm_id, num_tokens, num_tokens)
        return True

    def held(self, vllm_id: str, num_tokens: int) -> Table:
        """The request's blocks that are needed behind its first ``num_tokens``."""
        blocks = self._manager.req_to_blocks.get(vllm_id) or []
        first, past = self.first_needed(num_tokens), self.blocks_of(num_tokens)
        ids = [block.block_id for block in blocks[first:past]]
        missing = leading_nulls(ids)
        return Table(self.block_size, first + missing, tuple(ids[missing:]))


def leading_nulls(ids: Sequence[int]) -> int:
    """Number of null blocks (number 0) at the front of a table."""
    return next((position for position, block in enumerate(ids) if block), len(ids))


def groups_of(manager: KVCacheManager) -> list[Group]:
    """All groups of an engine, in vLLM's order."""
    coordinator = manager.coordinator
    sparse = coordinator.retention_interval is not None or len(set(coordinator.group_block_sizes)) > 1
    return [Group(each, sparse) for each in coordinator.single_type_managers]


def _why_state_stays(manager: MambaManager) -> str | None:
    if manager.num_speculative_blocks:
        return "speculative decoding"
    return None if manager.mamba_cache_mode in _STATES else f"mamba_cache_mode {manager.mamba_cache_mode}"


def only_movable(plan: KVCacheConfig) -> bool:
    """True when the caches of all layers have movable kinds. For workers, which have no managers."""
    specs: list[object] = []
    for group in plan.kv_cache_groups:
        specs += getattr(group.kv_cache_spec, "kv_cache_specs", {"": group.kv_cache_spec}).values()
    return all(type(spec) in _MOVED_SPECS for spec in specs)


def why_not_movable(manager: KVCacheManager) -> str | None:
    """Why requests of an engine cannot move, or None."""
    for each in manager.coordinator.single_type_managers:
        if isinstance(each, MambaManager) and (reason := _why_state_stays(each)):
            return f"the model has layers with a state, which cannot travel with {reason}"
        if type(each) not in _MOVED or each.kv_cache_spec.prefix_replay_tokens:
            return f"the model keeps state in {type(each.kv_cache_spec).__name__}, which cannot travel"
    return None
