# SPDX-License-Identifier: Apache-2.0
"""Moves KV cache blocks between agents.

agent.py     TransferAgent: register pools once, publish, fetch
handle.py    TransferHandle: wait, await, call back, cancel
config.py    AgentConfig, KVPool, TransferResult
layout.py    lists of blocks as memory to copy
regions.py   where the bytes of a block lie: storages, strides, pools over or beside each other
checksum.py  per-block checksums
copying.py   transfer_kv_cache: between devices of one process
lanes.py     transports and what they need of the host
control/     who may talk: records, and the stores they live in
data/        how bytes move: NIXL, CUDA IPC, plain TCP, copies in one process
session/     how two agents agree on a transfer
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from components.transfer.agent import TransferAgent
    from components.transfer.config import (
        AgentConfig,
        KVPool,
        StoreKind,
        Strategy,
        TransferResult,
        Transport,
    )
    from components.transfer.copying import CacheCopy, transfer_kv_cache
    from components.transfer.data.nixl import nixl_is_available
    from components.transfer.data.shared import SharedZeros, move_to_shared_memory
    from components.transfer.handle import TransferHandle

__all__ = [
    "AgentConfig",
    "CacheCopy",
    "KVPool",
    "SharedZeros",
    "StoreKind",
    "Strategy",
    "TransferAgent",
    "TransferHandle",
    "TransferResult",
    "Transport",
    "move_to_shared_memory",
    "nixl_is_available",
    "transfer_kv_cache",
]
_HOMES = {
    "TransferAgent": "agent",
    "CacheCopy": "copying",
    "transfer_kv_cache": "copying",
    "nixl_is_available": "data.nixl",
    "SharedZeros": "data.shared",
    "move_to_shared_memory": "data.shared",
    "TransferHandle": "handle",
}
"""Modules of the names that are not in ``config``, imported on first use (importing torch takes seconds)."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES.get(name, 'config')}"), name)
    globals()[name] = value
    return value
