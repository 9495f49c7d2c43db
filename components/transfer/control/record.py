# SPDX-License-Identifier: Apache-2.0
"""The record that an agent publishes, and a peer's checks of it before any byte moves."""

from __future__ import annotations

from typing import Annotated

import msgspec
import numpy as np

from components.errors import IncompatibleLayout, MigrateError, TransferError
from components.transfer.ids import AgentName, AgentRef, Epoch
from components.transfer.layout import Ints, Segment, is_one_run
from components.wire import UNREADABLE

MAX_RECORD_BYTES = 4 << 20
"""Bound of a NIXL blob, which has some kilobytes."""

_Short = Annotated[str, msgspec.Meta(max_length=512)]
_Blob = Annotated[bytes, msgspec.Meta(max_length=MAX_RECORD_BYTES)]
_Whole = Annotated[int, msgspec.Meta(ge=0)]
_Positive = Annotated[int, msgspec.Meta(ge=1)]


class RegionRecord(msgspec.Struct, frozen=True):
    """Memory of one pool: segments as (address, stride, length) in bytes."""

    name: _Short
    device: _Short
    device_id: int
    order: Annotated[str, msgspec.Meta(max_length=4096)]
    """Axes inside a block in memory order; see ``layout.Region``."""
    segments: Annotated[tuple[tuple[int, int, int], ...], msgspec.Meta(max_length=4096)]


class PoolRecord(msgspec.Struct, frozen=True, array_like=True):
    """How a pool's part of a block divides into KV heads; see ``shares.py``. Strides and addresses in bytes."""

    address: int
    """Of the first head of block 0."""
    stride: int
    """From a block to the next."""
    axes: Annotated[tuple[tuple[_Positive, int], ...], msgspec.Meta(min_length=2, max_length=16)]
    """(count, stride) of a head's axes; the last one counts the bytes of an element."""
    heads: _Positive
    """Of the model, over all ranks."""
    head_stride: int
    count: _Positive
    """Heads of this rank."""


class AgentRecord(msgspec.Struct, frozen=True, tag="agent/5"):
    """An agent as its peers know it. Layout fields must be equal on both sides; tensor-parallel sizes may differ."""

    name: _Short
    epoch: _Short
    started: float
    """Unix time at which this life (epoch) began; orders the lives of one name."""
    host: _Short
    """Id of the machine, for lanes within one host."""
    blob: _Blob
    """NIXL agent metadata; empty when the agent has no NIXL."""
    tcp_address: _Short
    """``host:port`` of the plain TCP lane; empty when it is off."""
    ipc: Annotated[tuple[_Blob, ...], msgspec.Meta(max_length=4096)]
    """CUDA IPC handles of the pools; empty when that lane is off."""
    fingerprint: _Short
    block_size: _Whole
    """Tokens of a block; 0 where blocks hold no tokens."""
    dtype: _Short
    layers: _Whole
    num_blocks: _Whole
    tp_rank: _Whole
    tp_size: _Positive
    regions: Annotated[tuple[RegionRecord, ...], msgspec.Meta(max_length=4096)]
    lanes: tuple[_Short, ...]
    scope: _Short = ""
    """Network namespace and user of an agent whose pools are in shared memory; empty when they are not."""
    stages: bool = False
    """True when it can gather blocks before it writes them."""
    pools: Annotated[tuple[PoolRecord, ...], msgspec.Meta(max_length=4096)] = ()
    """Empty when blocks do not divide into heads."""

    @property
    def ref(self) -> AgentRef:
        """Name and epoch."""
        return AgentRef(AgentName(self.name), Epoch(self.epoch))

    @property
    def key(self) -> str:
        """Name of this life, as NIXL knows it."""
        return f"{self.name}/{self.epoch}"

    def require_pairable(self, peer: AgentRecord) -> None:
        """Raise ``IncompatibleLayout`` naming the first field that differs. ``shares.py`` compares unequal ranks."""
        alike = self.tp_size == peer.tp_size
        for field in ("fingerprint", "dtype", "block_size", "layers", *(["tp_rank"] if alike else [])):
            local, remote = getattr(self, field), getattr(peer, field)
            if local != remote:
                raise IncompatibleLayout(
                    f"agents {self.name} and {peer.name} differ in {field}: {local!r} here, {remote!r} there"
                )
        if alike and _shape(self) != _shape(peer):
            raise IncompatibleLayout(f"agents {self.name} and {peer.name} lay their KV blocks out differently")

    def require_blocks(self, blocks: Ints, unique: bool) -> None:
        """Raise ``TransferError`` for unknown block numbers and, if ``unique``, for repeated ones."""
        if not len(blocks):
            return
        # Called for every transfer: a run needs one check, and plain reductions take a third of min() and max().
        run = is_one_run(blocks)
        lowest, highest = (blocks[0], blocks[-1]) if run else (np.minimum.reduce(blocks), np.maximum.reduce(blocks))
        if lowest < 0 or highest >= self.num_blocks:
            bad = lowest if lowest < 0 else highest
            raise TransferError(f"agent {self.name} has {self.num_blocks} blocks; {bad} is none of them")
        if unique and not run:
            # A third of np.unique's time.
            named = np.zeros(highest - lowest + 1, np.bool_)
            named[blocks - lowest] = True
            if int(np.count_nonzero(named)) != len(blocks):
                raise TransferError(f"a block of agent {self.name} is named twice as a destination")

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all regions."""
        return sum(length for region in self.regions for _, _, length in region.segments)

    def segments(self) -> list[Segment]:
        """Segments of all regions."""
        return [Segment(*s) for region in self.regions for s in region.segments]


def _shape(record: AgentRecord) -> list[tuple[str, list[int]]]:
    return [(r.order, [length for _, _, length in r.segments]) for r in record.regions]


_decoder = msgspec.msgpack.Decoder(AgentRecord)


def encode(record: AgentRecord) -> bytes:
    """The record as msgpack."""
    return msgspec.msgpack.encode(record)


def published(data: bytes, name: str) -> AgentRecord:
    """``decode``, for a record found under an agent's name, which it must have."""
    record = decode(data)
    if record.name != name:
        raise MigrateError(f"the record of agent {record.name!r} is published as {name!r}")
    return record


def decode(data: bytes) -> AgentRecord:
    """Read a record from the wire. Raises ``MigrateError`` on anything malformed."""
    if len(data) > MAX_RECORD_BYTES:
        raise MigrateError(f"an agent record of {len(data)} bytes is larger than {MAX_RECORD_BYTES}")
    try:
        return _decoder.decode(data)
    except UNREADABLE as error:
        raise MigrateError(f"not an agent record: {error}") from error
