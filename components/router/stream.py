# SPDX-License-Identifier: Apache-2.0
"""One client stream, whatever worker its request lives on.

Legs and owner
    A leg is the request on one worker; exactly one leg is the *owner*. Only the owner's tokens reach the
    client, and only at the index that comes next: repeated ones are dropped, early ones wait. When the owner
    changes, the frozen state names all tokens of the old one, so nothing is lost if it dies at that moment.

Probation
    A new owner is on probation until its first token has reached the client. If it fails before, ``switch_back``
    gives the request to the old owner, which was frozen all the time; afterwards its loss is told to the reader
    of the stream, who replays the request.

Threading: one asyncio loop. ``give`` gets each output as it comes; migrations run beside it under ``lock``.
Errors: ``give`` gets a ``MigrateError`` when the owner was lost; what it raises itself would be the worker's loss.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from components.engine.protocol import Frozen, GenerateOutput, GenerateRequest, KVOffer
from components.errors import DeadlineExceeded, MigrateError, SessionError, WorkerLost
from components.messages import EventKind, Generate, StreamEvent, StreamInfo, WorkerOp
from components.router.leg import Cut, Leg, Timing
from components.router.workers import Worker

logger = logging.getLogger(__name__)
_MAX_EVENTS = 256
_STEPS_UNDER_LEASE = 3
"""Of a migration, each with its deadline: freeze, commit, first token."""
_LATE_S = 1.0
"""How long tokens of the old owner may lag behind those of the new one before they are taken from its state."""


class Stream:
    """See the module docstring."""

    def __init__(
        self, request: GenerateRequest, step_deadline_s: float, give: Callable[[GenerateOutput | MigrateError], None]
    ) -> None:
        self.request = request
        self._give = give
        self.tokens: list[int] = list(request.output_token_ids)
        self.owner: Leg | None = None
        self.finished = False
        self.moves = 0
        self.replays = 0
        self.shunned: set[int] = set()
        """Workers that have failed this request."""
        self.timing = Timing()
        self.lock = asyncio.Lock()
        self.deadline_s = step_deadline_s
        """For each step of a migration."""
        self._born = time.monotonic()
        self._events: deque[StreamEvent] = deque(maxlen=_MAX_EVENTS)
        self.note(EventKind.ARRIVED)
        self._early: list[GenerateOutput] = []
        self._promised: tuple[int, ...] = ()
        """Tokens that the old owner made; taken as they are should it die before it delivered them."""
        self._old: Leg | None = None
        self._cut: Cut | None = None

    def keep_within(self, lease_s: float) -> None:
        """Bound the steps from the freeze to the first token: what is read after the lease may be another request's."""
        self.deadline_s = min(self.deadline_s, lease_s / _STEPS_UNDER_LEASE)

    # Reading

    def open(self, worker: Worker, frozen: Frozen | None = None, landing: KVOffer | None = None, **more: Any) -> Leg:
        """Start the request, as far as it has come, on a worker."""
        request = msgspec.structs.replace(
            self.request,
            output_token_ids=frozen.output_token_ids if frozen else tuple(self.tokens),
            landing=frozen.offer if frozen else landing,
            **more,
        )
        return Leg(worker, Generate(request, frozen), self)

    def take(self, leg: Leg, output: GenerateOutput) -> None:
        """An output of any leg."""
        if leg.dropped:
            return
        if leg is self._old:
            if output.finish_reason is not None:
                output = msgspec.structs.replace(output, finish_reason=None, frozen=None)
        elif leg is not self.owner:
            leg.held.append(output)
            return
        if output.index > len(self.tokens):
            self._early.append(output)
            self._check_gap()
            return
        self._deliver(output)
        self._deliver_early()

    def _deliver_early(self) -> None:
        while self._early and self._early[0].index <= len(self.tokens):
            self._deliver(self._early.pop(0))

    def _check_gap(self) -> None:
        """Tokens are missing and nobody is left to bring them: the owner cannot be trusted any more."""
        if self._early and self._old is None and not self.finished:
            gap = f"{self._early[0].index - len(self.tokens)} tokens are missing after {len(self.tokens)}"
            self._early.clear()
            if self.owner is not None:
                # All that it still gives comes after the gap, and one loss is told once.
                self.owner.dropped = True
            self._give(SessionError(gap))

    def _deliver(self, output: GenerateOutput) -> None:
        seen = len(self.tokens) - output.index
        if seen > 0:
            output = msgspec.structs.replace(
                output,
                index=len(self.tokens),
                token_ids=output.token_ids[seen:],
                logprobs=output.logprobs[seen:],
            )
        if self.finished or (not output.token_ids and output.finish_reason is None):
            return
        if output.token_ids:
            self.tokens += output.token_ids
            gap = self.timing.token(time.monotonic())
            if self._on_probation() and self._cut is not None and output.index >= self._cut.index:
                self._cut.downtime.set_result(gap)
        if output.finish_reason is not None:
            self.finished = True
        self._give(output)

    def leg_ended(self, leg: Leg) -> None:
        """A leg is over, for whatever reason."""
        if leg is self._old:
            self._fill_from_promise()
        elif leg is self.owner and leg.error is not None and not self._is_over(leg):
            self._give(leg.error)

    def _is_over(self, leg: Leg) -> bool:
        """Nobody waits for this owner: the answer is whole, its loss is known, or its migration deals with it."""
        return self.finished or leg.dropped or self._on_probation()

    def _on_probation(self) -> bool:
        return self._cut is not None and not self._cut.downtime.done()

    def _fill_from_promise(self) -> None:
        missing = self._promised[len(self.tokens) :]
        if missing:
            logger.warning("request %s: the source did not deliver %d tokens", self.request.request_id, len(missing))
            self._deliver(GenerateOutput(len(self.tokens), missing))
        self._deliver_early()

    def note(self, kind: EventKind, worker: Worker | None = None) -> None:
        """Remember a step in the request's life, for people."""
        self._events.append(StreamEvent(time.time(), kind, worker.name if worker else ""))

    def describe(self) -> StreamInfo:
        """Row for ``dynamo status``."""
        return StreamInfo(
            request_id=self.request.request_id,
            worker=self.owner.worker.name if self.owner else "",
            prompt_tokens=len(self.request.prompt_token_ids),
            output_tokens=len(self.tokens),
            age_s=time.monotonic() - self._born,
            moving=self.lock.locked(),
            moves=self.moves,
            replays=self.replays,
            events=tuple(self._events),
        )

    async def close(self) -> None:
        """The client is gone or served: end every leg."""
        self.finished = True
        for leg in (self.owner, self._old):
            if leg is not None and not leg.task.done():
                await self.abandon(leg)

    # Changing the owner

    def switch(self, leg: Leg, frozen: Frozen) -> None:
        """Make a leg the owner, on probation. ``frozen`` is the state it starts from."""
        self._old, self.owner = self.owner, leg
        self.note(EventKind.SWITCHED, leg.worker)
        self._promised = frozen.output_token_ids
        self._cut = Cut(len(frozen.output_token_ids), asyncio.get_running_loop().create_future())
        held, leg.held = leg.held, []
        for output in held:
            self.take(leg, output)
        if self._old is not None and self._old.ended.is_set():
            self._fill_from_promise()

    def switch_back(self, source: Leg | None) -> None:
        """The new owner failed on probation: the old one owns the request again."""
        self.owner, self._old, self._cut = source, None, None
        self.note(EventKind.STAYS, source.worker if source else None)
        self._early.clear()
        if source is not None and source.ended.is_set() and not self.finished:
            self._give(source.error or WorkerLost(f"worker {source.worker.name} has ended the request"))

    def replace_owner(self, worker: Worker) -> Leg | None:
        """Replay the request on a worker after the loss of its owner, which is returned."""
        lost, self._old, self._cut = self.owner, None, None
        self._early.clear()
        self.replays += 1
        self.owner = self.open(worker)
        self.note(EventKind.REPLAYED, worker)
        return lost

    async def first_token(self, leg: Leg) -> float:
        """Wait for the end of probation. Returns the downtime in seconds.

        Raises ``DeadlineExceeded`` when no token comes in time, or what ended the leg.
        """
        cut = self._cut
        if cut is None or leg is not self.owner:
            raise SessionError("the request has another owner by now")
        end = time.monotonic() + self.deadline_s
        ended = asyncio.ensure_future(leg.ended.wait())
        try:
            while not cut.downtime.done():
                left = end - time.monotonic()
                if left <= 0:
                    raise DeadlineExceeded(f"no token from worker {leg.worker.name} within {self.deadline_s:g} s")
                either: list[asyncio.Future[Any]] = [cut.downtime, ended]
                await asyncio.wait(either, timeout=min(left, _LATE_S), return_when=asyncio.FIRST_COMPLETED)
                if leg.ended.is_set() and leg.error is not None and not cut.downtime.done():
                    raise leg.error
                if self._early or leg.ended.is_set():
                    self._fill_from_promise()
                if leg.ended.is_set() and not cut.downtime.done():
                    # It ended without another token, for example at its length limit.
                    cut.downtime.set_result(0.0)
        finally:
            ended.cancel()
        return cut.downtime.result()

    async def abandon(self, leg: Leg) -> None:
        """End a leg that is not, or no longer, wanted."""
        leg.dropped = True
        with contextlib.suppress(MigrateError):
            await leg.worker.call(WorkerOp.ABORT, self.request.request_id, timeout_s=5.0)
        leg.task.cancel()

    async def release(self, leg: Leg) -> None:
        """The old owner may free its blocks; its last tokens are waited for."""
        try:
            await leg.worker.call(WorkerOp.RELEASE, self.request.request_id)
            await asyncio.wait_for(leg.ended.wait(), 5.0)
        except (MigrateError, TimeoutError) as error:
            # The worker's own lease frees the blocks; the client is already served by the new owner.
            logger.warning("releasing %s on %s: %s", self.request.request_id, leg.worker.name, error)
        if leg is self._old:
            self._fill_from_promise()
            self._old = None
            self._check_gap()
