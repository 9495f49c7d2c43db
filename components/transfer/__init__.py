# SPDX-License-Identifier: Apache-2.0
"""Moves KV cache blocks between agents.

agent.py     TransferAgent: register pools once, publish, fetch
config.py    AgentConfig, KVPool, TransferResult
checksum.py  per-block checksums
control/     who may talk: records, the stores they live in
data/        how bytes move: NIXL, or plain TCP where NIXL is missing
"""

from components.transfer.agent import TransferAgent, TransferHandle
from components.transfer.config import AgentConfig, KVPool, TransferResult, Transport
from components.transfer.data.nixl import nixl_is_available

__all__ = [
    "AgentConfig",
    "KVPool",
    "TransferAgent",
    "TransferHandle",
    "TransferResult",
    "Transport",
    "nixl_is_available",
]
