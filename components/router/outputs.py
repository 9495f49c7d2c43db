# SPDX-License-Identifier: Apache-2.0
"""One connection to a worker on which the outputs of all our requests there arrive; see ``components.worker.outputs``.

Life cycle: ``connect`` once; ``open`` from the worker's answer to the greeting until the connection is lost, which
every leg on it is told. ``retire`` closes it when the last leg has left. A worker that cannot be connected to is used
through streams: raises ``WorkerLost``. Threading: the router's loop; legs are called from ``data_received``.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from typing import Protocol, cast

import msgspec

from components.address import Address
from components.engine.protocol import GenerateOutput
from components.errors import MigrateError, WorkerLost
from components.frames import Frames, frame, unframe
from components.messages import MAX_BYTES, Batch, Hello

logger = logging.getLogger(__name__)
_CONNECT_S = 2.0
_batch = msgspec.msgpack.Decoder(Batch)
_numbers = itertools.count(1)


class Receiver(Protocol):
    """A request on a worker."""

    def receive(self, output: GenerateOutput) -> None:
        """The worker gave this."""

    def give_up(self, reason: str) -> None:
        """The connection is lost."""


class OutputChannel(asyncio.Protocol):
    """See the module docstring."""

    def __init__(self, worker: str) -> None:
        self.id = secrets.token_hex(16)
        self.open = False
        self._worker = worker
        self._frames = Frames(MAX_BYTES)
        self._receivers: dict[int, Receiver] = {}
        self._retired = False
        self._greeted: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @classmethod
    async def connect(cls, worker: str, address: str) -> OutputChannel:
        """Reach a worker. Raises ``WorkerLost`` when it cannot be reached in time."""
        channel = cls(worker)
        try:
            host, port = Address.of(address)
            async with asyncio.timeout(_CONNECT_S):
                transport, _ = await asyncio.get_running_loop().create_connection(lambda: channel, host, port)
                transport.write(frame(Hello(channel.id)))
                try:
                    await channel._greeted
                except BaseException:
                    transport.abort()
                    raise
        except (OSError, TimeoutError, ValueError) as error:
            raise WorkerLost(f"no connection for outputs to {worker} at {address}: {error}") from error
        return channel

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The worker listens."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Outputs of any of our requests."""
        try:
            for body in self._frames.feed(data):
                self._deliver(unframe(body, _batch))
        except MigrateError as error:
            logger.warning("outputs of worker %s: %s", self._worker, error)
            self._transport.close()

    def _deliver(self, batch: Batch) -> None:
        if not self._greeted.done():
            self.open = True
            self._greeted.set_result(None)
        for leg, output in batch.outputs:
            receiver = self._receivers.get(leg)
            if receiver is not None:
                receiver.receive(output)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell everybody; what a worker gave after that is recomputed elsewhere."""
        self.open = False
        if not self._greeted.done():
            self._greeted.set_exception(ConnectionError("closed before the greeting was answered"))
        for receiver in list(self._receivers.values()):
            receiver.give_up(f"worker {self._worker} closed the connection of its outputs")

    def add(self, receiver: Receiver) -> int:
        """A request starts. Returns the number under which its outputs come."""
        number = next(_numbers)
        self._receivers[number] = receiver
        return number

    def remove(self, number: int) -> None:
        """A request is over."""
        self._receivers.pop(number, None)
        if self._retired:
            self.retire()

    def retire(self) -> None:
        """Nothing starts here any more: close it once nobody is left."""
        self._retired = True
        if not self._receivers:
            self._transport.close()
