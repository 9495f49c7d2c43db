# SPDX-License-Identifier: Apache-2.0
"""One pair's communicator, the socket that orders its use, and the loops that move blocks over both.

The requesting agent opens a link to a peer and sends one ``Ask`` at a time; the peer answers and both ends then post
the same chunks in the same order. The closed socket reveals a dead peer at once, where NCCL's kernel would spin.
Threading: a link belongs to one thread at a time, which polls. Nothing is queued on the device behind a receive before
it has ended: only NCCL's own kernel waits for a peer, and ``abort`` ends that kernel.
Errors: ``TransferError`` and its kin; the link is then ``broken`` and must be closed.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Annotated

import msgspec

from components.errors import DeadlineExceeded, TransferCancelled, TransferError
from components.frames import is_open
from components.transfer import profiling
from components.transfer.data.nccl_wire import Flight, Wire
from components.transfer.data.staging import Gate, Staging
from components.transfer.layout import Ints
from components.transfer.session.messages import MAX_BLOCKS

MAX_FRAME = 4 * MAX_BLOCKS + 4096
_POLL_S = 20e-6
_LOOK_S = 5e-3
"""Interval between checks of the socket while bytes move."""

_Text = Annotated[str, msgspec.Meta(max_length=1024)]


Stopped = Callable[[], bool]


class Hello(msgspec.Struct, frozen=True):
    """Opens a link: the agent's name, and the blocks that fit a slot."""

    name: _Text
    slot_blocks: Annotated[int, msgspec.Meta(ge=1)]


class Ask(msgspec.Struct, frozen=True):
    """Requests blocks of the receiver."""

    blocks: Annotated[bytes, msgspec.Meta(max_length=4 * MAX_BLOCKS)]
    budget_ms: Annotated[int, msgspec.Meta(ge=1)]


class Answer(msgspec.Struct, frozen=True):
    """Answers ``Hello`` and ``Ask``. ``busy``: request again."""

    error: _Text = ""
    busy: bool = False
    slot_blocks: int = 0


class Patience:
    """Ends a wait when the transfer is stopped or late, or the peer has gone."""

    def __init__(self, sock: socket.socket, end: float, stopped: Stopped) -> None:
        self._sock = sock
        self._end = end
        self._stopped = stopped
        self._look = 0.0

    def until(self, done: Callable[[], bool]) -> None:
        """Wait. Raises ``TransferCancelled``, ``DeadlineExceeded`` or ``TransferError``."""
        while not done():
            self.check()
            time.sleep(_POLL_S)

    def check(self) -> None:
        """Raise one of these errors where it applies."""
        if self._stopped():
            raise TransferCancelled("the transfer was stopped")
        now = time.monotonic()
        if now > self._end:
            raise DeadlineExceeded("the transfer did not end within its deadline")
        if now > self._look:
            self._look = now + _LOOK_S
            if not is_open(self._sock):
                raise TransferError("the peer has closed its link")


class Link:
    """See the module docstring."""

    def __init__(self, sock: socket.socket, wire: Wire, staging: Staging, slot_blocks: int) -> None:
        self.sock = sock
        self._wire = wire
        self._staging = staging
        self._chunk = slot_blocks * staging.block_bytes
        self.broken = False

    def send(self, blocks: Ints, slots: Sequence[int], patience: Patience) -> None:
        """Send blocks: gathers one chunk while another is in flight."""
        staging, index = self._staging, self._staging.index(blocks)
        flying: deque[tuple[Flight, object]] = deque()

        def settle() -> None:
            flight, mark = flying.popleft()
            patience.until(flight.done)
            profiling.end(mark)

        try:
            for number, (first, last) in enumerate(staging.chunks(len(blocks), self._chunk)):
                if len(flying) == len(slots):
                    settle()
                slot = slots[number % len(slots)]
                staging.gather(index[first:last], slot)
                mark = profiling.begin("wire", (last - first) * staging.block_bytes)
                with staging.ordered():
                    flying.append((self._wire.send(staging.part(slot, last - first)), mark))
            while flying:
                settle()
        finally:
            for _, mark in flying:
                profiling.end(mark)

    def receive(self, blocks: Ints, slots: Sequence[int], patience: Patience, arrived: Callable[[int], None]) -> int:
        """Receive blocks: scatters one chunk while another is in flight. Returns their bytes."""
        staging, index = self._staging, self._staging.index(blocks)
        chunks = staging.chunks(len(blocks), self._chunk)
        flying: deque[tuple[int, Flight]] = deque()
        scattered: Gate | None = None
        total = 0
        try:
            for number in range(len(chunks) + len(slots)):
                if number >= len(slots) and flying:
                    chunk, flight = flying.popleft()
                    patience.until(flight.done)
                    first, last = chunks[chunk]
                    scattered = staging.scatter(index[first:last], slots[chunk % len(slots)])
                    # Its slot is reused next; the other slot's chunk is in flight meanwhile.
                    patience.until(scattered.ready)
                    total += (last - first) * staging.block_bytes
                    arrived((last - first) * staging.block_bytes)
                if number < len(chunks):
                    first, last = chunks[number]
                    with staging.ordered():
                        into = staging.part(slots[number % len(slots)], last - first)
                        flying.append((number, self._wire.receive(into)))
        finally:
            if scattered is not None:
                scattered.wait()
        return total

    def close(self) -> bool:
        """Close, with everything in flight. False when NCCL may still use the slots."""
        self.broken = True
        ended = self._wire.abort()
        # close() alone would not wake a waiting thread.
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return ended
        self.sock.close()
        return ended
