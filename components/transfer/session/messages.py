# SPDX-License-Identifier: Apache-2.0
"""Messages between two agents, carried as NIXL notifications.

    destination                              source
    Ask(src, slots | dst) ---------------->  checks, then for each chunk: gather, WRITE
    <-------------------- Landed(chunk) ---  (rides on the WRITE: it arrives after the bytes)
    scatter, Freed(chunk) ---------------->  may overwrite that slot (only if the slot is needed again)
    <-------------------------- Ended ----   nothing will be written any more
    Stop ----------------------------->      answered with Ended

Each carries an HMAC with the secret (``components.credentials``) over sender, receiver and their epochs: nobody else
can make an agent write its blocks, report a landed chunk, or forward a message. ``decode`` bounds sizes
and raises ``TransferError``; its result may still name unknown blocks.
"""

from __future__ import annotations

import hmac
from typing import Annotated

import msgspec
import numpy as np

from components import credentials
from components.errors import TransferError
from components.transfer.layout import Ints
from components.wire import UNREADABLE

MAX_MESSAGE_BYTES = 16 << 20
MAX_BLOCKS = 1 << 20
_SEAL_BYTES = 32

_Id = Annotated[int, msgspec.Meta(ge=0)]
_Text = Annotated[str, msgspec.Meta(max_length=1024)]
_Blocks = Annotated[bytes, msgspec.Meta(max_length=4 * MAX_BLOCKS)]


class Ask(msgspec.Struct, frozen=True, tag="ask"):
    """Requests blocks: the receiver writes them into ``slots`` in turn or, without slots, into blocks ``dst``."""

    id: _Id
    request_id: _Text
    src: _Blocks
    dst: _Blocks
    slots: Annotated[tuple[_Id, ...], msgspec.Meta(max_length=64)]
    slot_bytes: _Id
    budget_ms: _Id


class Landed(msgspec.Struct, frozen=True, tag="landed"):
    """A chunk is in its slot."""

    id: _Id
    chunk: _Id


class Freed(msgspec.Struct, frozen=True, tag="freed"):
    """A chunk's slot is free."""

    id: _Id
    chunk: _Id


class Ended(msgspec.Struct, frozen=True, tag="ended"):
    """The source writes no more for this id. ``code``: empty, or that of an error."""

    id: _Id
    code: _Text = ""
    message: _Text = ""
    bytes: int = 0
    descriptors: int = 0
    prep_s: float = 0.0
    post_s: float = 0.0
    wire_s: float = 0.0
    lane: _Text = ""
    """Transports that UCX chose at the writing side."""


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """Requests the end of writing, which ``Ended`` confirms."""

    id: _Id


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """Opens the connection; ``reply`` requests one in return."""

    id: _Id
    reply: bool


Message = Ask | Landed | Freed | Ended | Stop | Hello
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message, sender: str, receiver: str) -> bytes:
    """The message with its HMAC, from one agent and epoch to another."""
    data = msgspec.msgpack.encode(message)
    return seal(data, sender, receiver) + data


def seal(data: bytes, sender: str, receiver: str) -> bytes:
    """The HMAC of a message from that sender to that receiver."""
    return credentials.mac(b"session", sender.encode(), receiver.encode(), data)


def decode(data: bytes, sender: str, receiver: str) -> Message:
    """Read a message. Raises ``TransferError`` when it is malformed, too large or not sealed."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise TransferError(f"a message of {len(data)} bytes is larger than {MAX_MESSAGE_BYTES}")
    given, body = data[:_SEAL_BYTES], data[_SEAL_BYTES:]
    if not hmac.compare_digest(given, seal(body, sender, receiver)):
        raise TransferError(
            f"it is not sealed with the secret in {credentials.VARIABLE}, or was meant for another agent"
        )
    try:
        return _decoder.decode(body)
    except UNREADABLE as error:
        raise TransferError(f"not a message of an agent: {error}") from error


def pack(blocks: Ints) -> bytes:
    """Block ids as 32-bit little-endian integers."""
    return bytes(blocks.astype("<u4").tobytes())


def unpack(data: bytes) -> Ints:
    """Reverse of ``pack``."""
    if len(data) % 4:
        raise TransferError("a block list is cut off")
    return np.frombuffer(data, "<u4").astype(np.int64)
