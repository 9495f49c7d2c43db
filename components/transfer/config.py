# SPDX-License-Identifier: Apache-2.0
"""Plain values of the transfer component: what an agent is told, what a transfer gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    import torch


class Transport(StrEnum):
    """What ``--nixl-transport`` takes; see ``lanes.py`` for what each sets."""

    AUTO = "auto"
    IB = "ib"
    NVLINK = "nvlink"
    TCP = "tcp"
    SHM = "shm"


@dataclass(frozen=True)
class KVPool:
    """One tensor of KV blocks. ``block_dim`` is the axis that counts blocks."""

    name: str
    tensor: torch.Tensor
    num_blocks: int
    block_dim: int


class AgentConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything an agent needs to know before it starts."""

    name: str
    """Unique in the namespace; a restarted worker keeps it and gets a new epoch."""
    etcd_endpoints: tuple[str, ...] = ()
    """URLs of etcd; empty keeps records in this process (tests)."""
    etcd_user: str = ""
    etcd_password: str = ""
    namespace: str = "dynamo"
    transport: Transport = Transport.AUTO
    advertise_host: str = "127.0.0.1"
    """Where peers reach this host, for lanes that need an address of ours."""
    lease_ttl_s: int = 10
    fingerprint: str = ""
    block_size: int = 0
    """Tokens per KV block."""
    dtype: str = ""
    layers: int = 0
    tp_rank: int = 0
    tp_size: int = 1
    piece_bytes: int = 32 << 20
    """Bytes posted at once: shared-memory copies happen inside the post."""


@dataclass(frozen=True)
class TransferResult:
    """What a finished transfer did. Times in seconds; ``lane`` is the backend and transport used."""

    bytes: int = 0
    descriptors: int = 0
    prep_s: float = 0.0
    post_s: float = 0.0
    wire_s: float = 0.0
    lane: str = ""


@dataclass(frozen=True)
class Segment:
    """Equal pieces of memory, one for each block, ``stride`` bytes apart."""

    address: int
    stride: int
    length: int


@dataclass(frozen=True)
class Region:
    """One registered tensor and the segments that its blocks are made of."""

    name: str
    tensor: torch.Tensor = field(compare=False, repr=False)
    segments: tuple[Segment, ...] = ()


def region_of(pool: KVPool) -> Region:
    """Segments of a pool, from its strides.

    Whatever lies outside the block axis (K and V planes, say) gives one segment each; what lies
    inside must be contiguous.
    """
    tensor = pool.tensor
    size = tensor.element_size()
    stride = tensor.stride(pool.block_dim) * size
    offsets = [0]
    inner = 1
    for axis, (length, step) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if axis == pool.block_dim or length == 1:
            continue
        if step * size > stride:
            offsets = [base + i * step * size for base in offsets for i in range(length)]
        else:
            inner *= length
    segments = tuple(Segment(tensor.data_ptr() + off, stride, inner * size) for off in offsets)
    return Region(pool.name, tensor, segments)
