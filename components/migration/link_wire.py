# SPDX-License-Identifier: Apache-2.0
"""What goes over a link between two workers; see ``links``. No state."""

from __future__ import annotations

import asyncio
import socket
from typing import Annotated

import msgspec

from components.frames import encoded
from components.migration.messages import Attached, WorkerCall, WorkerReply

MAX_BYTES = 64 << 20
"""Of one message."""


class Said(msgspec.Struct, frozen=True):
    """One call. The caller gives each one a number."""

    number: int
    call: WorkerCall


class Told(msgspec.Struct, frozen=True, omit_defaults=True):
    """Answers to calls, and items for readers, by the numbers of their calls."""

    replies: Annotated[tuple[tuple[int, WorkerReply], ...], msgspec.Meta(max_length=65536)] = ()
    items: Annotated[tuple[tuple[int, Attached], ...], msgspec.Meta(max_length=65536)] = ()


def purpose(epoch: str) -> str:
    """Of the handshake."""
    return f"worker-link {epoch}"


def say(writer: asyncio.StreamWriter, message: Said | Told) -> None:
    """Send one message. Raises ``InvalidRequest`` for a too large one."""
    writer.write(encoded(message, MAX_BYTES))


async def streams(sock: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Both directions of a connection after its handshake."""
    sock.setblocking(False)
    return await asyncio.open_connection(sock=sock)
