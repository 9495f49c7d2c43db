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
    from components.transfer.agent import TransferAgent as TransferAgent
    from components.transfer.config import AgentConfig as AgentConfig
    from components.transfer.config import KVPool as KVPool
    from components.transfer.config import StoreKind as StoreKind
    from components.transfer.config import Strategy as Strategy
    from components.transfer.config import TransferResult as TransferResult
    from components.transfer.config import Transport as Transport
    from components.transfer.copying import CacheCopy as CacheCopy
    from components.transfer.copying import transfer_kv_cache as transfer_kv_cache
    from components.transfer.data.nixl import nixl_is_available as nixl_is_available
    from components.transfer.data.shared import SharedZeros as SharedZeros
    from components.transfer.handle import TransferHandle as TransferHandle

_HOMES = {
    "config": ("AgentConfig", "KVPool", "StoreKind", "Strategy", "TransferResult", "Transport"),
    "agent": ("TransferAgent",),
    "copying": ("CacheCopy", "transfer_kv_cache"),
    "data.nixl": ("nixl_is_available",),
    "data.shared": ("SharedZeros",),
    "handle": ("TransferHandle",),
}
"""Names by module, imported on first use (importing torch takes seconds)."""


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            globals()[name] = value = getattr(import_module(f"{__name__}.{home}"), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
