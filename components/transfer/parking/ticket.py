# SPDX-License-Identifier: Apache-2.0
"""The ticket of a parked request: its owner, the layout that it needs, and a checksum of every block.

In a file the ticket follows the blocks, and a trailer of fixed size follows the ticket. Reading is bounded and raises
``IntegrityError`` for a truncated or changed file. Pure values, no threads.
"""

from __future__ import annotations

import hashlib
import re
import struct
import zlib
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated

import msgspec

from components.errors import ConfigError, IncompatibleLayout, IntegrityError, StaleEpoch, TransferError
from components.transfer.control.record import AgentRecord
from components.transfer.layout import groups_of
from components.wire import UNREADABLE

MAX_TICKET_BYTES = 32 << 20
MAX_BLOCKS = 1 << 20
TRAILER = struct.Struct("<IIQ8s")
_MAGIC = b"DYNPARK1"
_ID = re.compile(r"[0-9a-f]{32}")
FITS = ("fingerprint", "dtype", "layers", "kv_heads", "head_size", "block_size", "tp_rank", "tp_size")
"""Fields in which a ticket and an agent's record must be equal."""

_Text = Annotated[str, msgspec.Meta(max_length=1024)]
_Count = Annotated[int, msgspec.Meta(ge=0)]


class Place(StrEnum):
    """Places for parked KV."""

    HOST = "host"
    """Pinned host memory of this agent; lost when the process ends."""
    FILE = "file"
    """A file in the parking folder, which any agent with the same model and layout can restore."""


class Ticket(msgspec.Struct, frozen=True, tag="parked/1"):
    """See the module docstring."""

    id: _Text
    place: Place
    agent: _Text
    epoch: _Text
    """Epoch of the agent that parked it."""
    request_id: _Text
    tokens: _Count
    """Tokens in the blocks; the last block may be partly filled."""
    fingerprint: _Text
    dtype: _Text
    layers: int
    kv_heads: int
    head_size: int
    block_size: int
    tp_rank: int
    tp_size: int
    layout: _Text
    """Digest of the byte layout of a block."""
    block_bytes: _Count
    chunk_blocks: Annotated[int, msgspec.Meta(ge=1)]
    """Blocks in a stored group."""
    hashes: Annotated[tuple[Annotated[bytes, msgspec.Meta(max_length=64)], ...], msgspec.Meta(max_length=MAX_BLOCKS)]
    """The caller's own hashes of the blocks (prefix cache); may be empty."""
    checksums: Annotated[tuple[_Count, ...], msgspec.Meta(max_length=MAX_BLOCKS)]

    @property
    def total_bytes(self) -> int:
        """Bytes of all blocks."""
        return len(self.checksums) * self.block_bytes

    def chunks(self) -> list[tuple[int, int]]:
        """Block ranges, each stored as one group."""
        return groups_of(len(self.checksums), self.chunk_blocks)

    def require_fit(self, record: AgentRecord, hashes: Sequence[bytes]) -> None:
        """Raise ``IncompatibleLayout`` or ``IntegrityError`` when agent or hashes do not fit the ticket."""
        for field in FITS:
            local, parked = getattr(record, field), getattr(self, field)
            if local != parked:
                raise IncompatibleLayout(
                    f"parked request {self.request_id} and agent {record.name} differ in {field}: "
                    f"{parked!r} parked, {local!r} here"
                )
        if (self.layout, self.block_bytes) != (layout_of(record), record.block_bytes):
            raise IncompatibleLayout(
                f"agent {record.name} lays its KV blocks out differently from parked request {self.request_id}"
            )
        if hashes and tuple(hashes) != self.hashes:
            raise IntegrityError(f"the parked blocks of request {self.request_id} are not those that are wanted")


def layout_of(record: AgentRecord) -> str:
    """Digest of the order and length of all segments."""
    shape = [(r.order, [length for _, _, length in r.segments]) for r in record.regions]
    return hashlib.blake2b(msgspec.msgpack.encode(shape), digest_size=16).hexdigest()


def require_id(ticket: Ticket) -> str:
    """The id, which is a file's name. Raises ``ConfigError`` for anything but an id of ``Parking``."""
    if not _ID.fullmatch(ticket.id):
        raise ConfigError(f"ticket id {ticket.id[:80]!r}: 32 hexadecimal digits")
    return ticket.id


_decoder = msgspec.msgpack.Decoder(Ticket)


def pack(ticket: Ticket) -> bytes:
    """Ticket and trailer, which follow the blocks in a file."""
    body = msgspec.msgpack.encode(ticket)
    if len(body) > MAX_TICKET_BYTES:
        raise TransferError(f"a ticket of {len(body)} bytes is larger than {MAX_TICKET_BYTES}")
    return body + TRAILER.pack(len(body), zlib.crc32(body), ticket.total_bytes, _MAGIC)


def unpack_trailer(data: bytes, size: int) -> tuple[int, int]:
    """Length and check value of the ticket in a file of ``size`` bytes, from its last bytes."""
    if len(data) != TRAILER.size:
        raise IntegrityError("the file is cut off")
    length, check, blocks, magic = TRAILER.unpack(data)
    if magic != _MAGIC:
        raise IntegrityError("the file is cut off, or is no parked request")
    if length > MAX_TICKET_BYTES or blocks + length + TRAILER.size != size:
        raise IntegrityError(f"the file has {size} bytes where its end speaks of {blocks + length + TRAILER.size}")
    return length, check


def unpack(body: bytes, check: int) -> Ticket:
    """The ticket of a file."""
    if zlib.crc32(body) != check:
        raise IntegrityError("its ticket has been changed")
    try:
        return _decoder.decode(body)
    except UNREADABLE as error:
        raise IntegrityError(f"its ticket cannot be read: {error}") from error


def require_same(found: Ticket, wanted: Ticket) -> None:
    """Raise ``IntegrityError`` when a file does not hold what the ticket says."""
    if found.epoch != wanted.epoch:
        raise StaleEpoch(f"it was parked in epoch {found.epoch[:8]}, the ticket is of {wanted.epoch[:8]}")
    for field in Ticket.__struct_fields__:
        if getattr(found, field) != getattr(wanted, field):
            raise IntegrityError(f"it differs from the ticket in {field}")
