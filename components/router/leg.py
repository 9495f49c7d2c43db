# SPDX-License-Identifier: Apache-2.0
"""One request on one worker, as the router sees it, and the times at which its tokens came."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from components.engine.protocol import FinishReason, GenerateOutput
from components.errors import MigrateError, WorkerLost, from_code
from components.messages import Generate
from components.router.workers import Worker

if TYPE_CHECKING:
    from components.router.stream import Stream

_LATE_S = 5.0
"""How long a channel's outputs may come after the end of the stream that started the request."""


class Leg:
    """The request on one worker, and the task that reads it."""

    def __init__(self, worker: Worker, message: Generate, stream: Stream) -> None:
        self.worker = worker
        self.ended = asyncio.Event()
        self.error: MigrateError | None = None
        self.held: list[GenerateOutput] = []
        """What came before this leg was made the owner: its first token may overtake the commit's answer."""
        self.dropped = False
        """Nobody wants it any more: what still comes is the echo of its end."""
        self.heard = time.monotonic()
        """When it last gave something."""
        self._stream = stream
        self._over = False
        self._channel = worker.channel if worker.channel is not None and worker.channel.open else None
        if self._channel is not None:
            self._number = self._channel.add(self)
            message = msgspec.structs.replace(message, channel=self._channel.id, leg=self._number)
        worker.streams += 1
        asked = message.request
        tokens = len(asked.prompt_token_ids) + len(asked.output_token_ids)
        self._to_compute = tokens if asked.landing is None else 0
        worker.prompt_tokens += self._to_compute
        worker.prompts += self._to_compute > 0
        self.task = asyncio.ensure_future(self._read(message))

    async def _read(self, message: Generate) -> None:
        from dynamo._core import Context

        context = Context(f"{message.request.request_id}.{self.worker.name}")
        try:
            async for output in self.worker.generate(message, context):
                self._take(output)
                if self._over:
                    break
            else:
                if self._channel is not None:
                    # Its last outputs may still be on their way there; the end of it cuts this short.
                    await asyncio.sleep(_LATE_S)
                self.error = WorkerLost(f"worker {self.worker.name} ended the stream in the middle")
        except MigrateError as error:
            self.error = error
        except asyncio.CancelledError:
            if not self._over:
                context.stop_generating()
                raise
        finally:
            if self._channel is not None:
                self._channel.remove(self._number)
            self.worker.streams -= 1
            self._computed()
            self.ended.set()
            self._stream.leg_ended(self)

    def receive(self, output: GenerateOutput) -> None:
        """It came over the channel."""
        if not self._over:
            self._take(output)
            if self._over:
                self.task.cancel()

    def _computed(self) -> None:
        """Its prompt is no load any more."""
        self.worker.prompt_tokens -= self._to_compute
        self.worker.prompts -= self._to_compute > 0
        self._to_compute = 0

    def _take(self, output: GenerateOutput) -> None:
        self.heard = time.monotonic()
        self._computed()
        if output.error is not None:
            self.error = from_code(*output.error)
        elif output.finish_reason is FinishReason.CANCELLED:
            # Nobody asked for that, or nobody listens: an answer must not end in its middle.
            self.error = WorkerLost(f"worker {self.worker.name} has cancelled the request")
        else:
            self.worker.tokens += len(output.token_ids)
            self._stream.take(self, output)
        self._over = self.error is not None or output.finish_reason is not None

    def give_up(self, reason: str) -> None:
        """Take the worker for lost, although the connection stands."""
        self.error = WorkerLost(reason)
        self.task.cancel()


@dataclass
class Timing:
    """When tokens reached the client, for downtime and stall. Seconds."""

    last: float = 0.0
    gaps: deque[float] = field(default_factory=lambda: deque(maxlen=64))

    def token(self, now: float) -> float:
        """A token has just arrived: its distance from the one before, 0 for the first."""
        gap = now - self.last if self.last else 0.0
        if self.last:
            self.gaps.append(gap)
        self.last = now
        return gap

    def median_gap(self) -> float:
        """Median of the last gaps between tokens."""
        return statistics.median(self.gaps) if self.gaps else 0.0


@dataclass
class Cut:
    """The place where one owner follows another."""

    index: int
    """Of the first token that the new owner makes."""
    downtime: asyncio.Future[float]
    """Time between the last token of the old owner and that one, once it has reached the client."""
