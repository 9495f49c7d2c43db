# SPDX-License-Identifier: Apache-2.0
"""Gives the outputs of all requests of a router over one connection: one message for each engine step.

A stream of Dynamo's costs both processes several changes of thread for each token; here it is part of one write and
one read for all requests of a step. A router connects, says ``Hello`` and gets an empty ``Batch``; requests whose
``Generate`` names its channel are answered there, all others in their own stream.

Threading: the worker's asyncio loop. A peer that says nothing valid within ``_HELLO_S``, or does not read, is cut off;
its requests end with their next output, like those of any router that is lost.
"""

from __future__ import annotations

import asyncio
import logging
from typing import cast

import msgspec

from components.address import Address, bare, listen
from components.engine.protocol import GenerateOutput
from components.errors import MigrateError
from components.frames import Frames, frame, unframe
from components.messages import Batch, Hello

logger = logging.getLogger(__name__)
_HELLO_S = 10.0
_HELLO_BYTES = 1024
_MOST_PEERS = 256
_MOST_BUFFERED = 64 << 20
_hello = msgspec.msgpack.Decoder(Hello)


class Outlet(asyncio.Protocol):
    """The connection of one router."""

    def __init__(self, known: dict[str, Outlet]) -> None:
        self.open = False
        self._known = known
        self._channel = ""
        self._frames = Frames(_HELLO_BYTES)
        self._waiting: list[tuple[int, GenerateOutput]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Somebody has come."""
        self._transport = cast(asyncio.Transport, transport)
        self._loop = asyncio.get_running_loop()
        self._late = self._loop.call_later(_HELLO_S, self._transport.abort)

    def data_received(self, data: bytes) -> None:
        """The greeting, and nothing after it."""
        try:
            for body in self._frames.feed(data):
                self._greet(unframe(body, _hello).channel)
        except MigrateError as error:
            logger.warning("a connection for outputs is refused: %s", error)
            self._transport.abort()

    def _greet(self, channel: str) -> None:
        if self._channel or channel in self._known or len(self._known) >= _MOST_PEERS:
            self._transport.abort()
            return
        self._late.cancel()
        self._channel = channel
        self._known[channel] = self
        self.open = True
        self._transport.write(frame(Batch(())))

    def connection_lost(self, exc: Exception | None) -> None:
        """The router is gone, or was cut off."""
        self._late.cancel()
        self.open = False
        self._waiting.clear()
        if self._known.get(self._channel) is self:
            del self._known[self._channel]

    def give(self, leg: int, output: GenerateOutput) -> bool:
        """Send an output with all others that the engine gives in this turn of the loop. False: nobody is there."""
        if self.open:
            if not self._waiting:
                self._loop.call_soon(self._flush)
            self._waiting.append((leg, output))
        return self.open

    def _flush(self) -> None:
        if not self.open:
            return
        self._transport.write(frame(Batch(tuple(self._waiting))))
        self._waiting.clear()
        if self._transport.get_write_buffer_size() > _MOST_BUFFERED:
            logger.warning("a router does not read its outputs: %d bytes wait, it is cut off", _MOST_BUFFERED)
            self._transport.abort()


class OutputServer:
    """Where routers connect. ``start`` once, then ``stop``."""

    def __init__(self) -> None:
        self._known: dict[str, Outlet] = {}
        self._server: asyncio.Server | None = None

    async def start(self, host: str) -> str:
        """Listen. Returns host:port, or nothing where that host is not this machine's: streams carry all then."""
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(lambda: Outlet(self._known), sock=listen(host))
        except OSError as error:
            logger.warning("no connections for outputs on %s: %s", host, error)
            return ""
        return str(Address(bare(host), self._server.sockets[0].getsockname()[1]))

    def find(self, channel: str) -> Outlet | None:
        """The router that said this, while it is there."""
        return self._known.get(channel) if channel else None

    def stop(self) -> None:
        """Listen no more; routers notice the end of the process."""
        if self._server is not None:
            self._server.close()
