# SPDX-License-Identifier: Apache-2.0
"""One client stream, whatever worker its request lives on.

Legs and owner
    A leg is the request on one worker; exactly one leg is the *owner*. Only the owner's tokens reach the
    client, and only at the index that comes next: repeated ones are dropped, early ones wait. When the owner
    changes, the frozen state names all tokens of the old one, so nothing is lost if it dies at that moment.

Threading: one asyncio loop. ``outputs`` is read by the request's handler; ``migrate`` runs beside it.
Time-outs: ``step_deadline_s`` for each step of a migration, owned here.
Errors: ``outputs`` ends with the request, or raises ``WorkerLost`` when nobody could go on with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import statistics
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import msgspec

from components.engine.protocol import FinishReason, Frozen, GenerateOutput, GenerateRequest, KVOffer, LandingStatus
from components.errors import (
    DeadlineExceeded,
    MigrateError,
    NotMigratable,
    RequestNotFound,
    SessionError,
    WorkerLost,
    from_code,
)
from components.messages import Generate, Mode, MoveRecord, StreamInfo, WorkerOp
from components.router.workers import Worker

logger = logging.getLogger(__name__)
_POLL_S = 0.004


class Leg:
    """The request on one worker, and the task that reads it."""

    def __init__(self, worker: Worker, message: Generate, stream: Stream) -> None:
        self.worker = worker
        self.started = asyncio.Event()
        """Set with the first output of any kind."""
        self.ended = asyncio.Event()
        self.error: MigrateError | None = None
        self._stream = stream
        worker.streams += 1
        self.task = asyncio.ensure_future(self._read(message))

    async def _read(self, message: Generate) -> None:
        from dynamo._core import Context

        context = Context(f"{message.request.request_id}.{self.worker.name}")
        try:
            async for output in self.worker.generate(message, context):
                if output.error is not None:
                    self.error = from_code(*output.error)
                    break
                self.started.set()
                self._stream.take(self, output)
                if output.finish_reason is not None:
                    break
            else:
                self.error = WorkerLost(f"worker {self.worker.name} ended the stream in the middle")
        except MigrateError as error:
            self.error = error
        except asyncio.CancelledError:
            context.stop_generating()
            raise
        finally:
            self.worker.streams -= 1
            self.ended.set()
            self._stream.leg_ended(self)


@dataclass
class Timing:
    """When tokens arrived, for downtime and stall."""

    last: float = 0.0
    gaps: deque[float] | None = None

    def token(self, now: float) -> None:
        """A token has just arrived from the owner."""
        if self.gaps is None:
            self.gaps = deque(maxlen=64)
        elif self.last:
            self.gaps.append(now - self.last)
        self.last = now

    def median_gap(self) -> float:
        """Median of the last gaps between tokens, in seconds."""
        return statistics.median(self.gaps) if self.gaps else 0.0


class Stream:
    """See the module docstring."""

    def __init__(self, request: GenerateRequest, step_deadline_s: float, max_rounds: int) -> None:
        self.request = request
        self.tokens: list[int] = list(request.output_token_ids)
        self.owner: Leg | None = None
        self.outputs: asyncio.Queue[GenerateOutput | MigrateError] = asyncio.Queue()
        self.finished = False
        self.frozen: Frozen | None = None
        """State from the prefill worker, until a decode worker has taken it."""
        self.moves = 0
        self.replays = 0
        self.timing = Timing()
        self._born = time.monotonic()
        self._deadline_s = step_deadline_s
        self._max_rounds = max_rounds
        self._early: list[GenerateOutput] = []
        self._promised: tuple[int, ...] = ()
        """Tokens that the old owner made; taken as they are should it die before it delivered them."""
        self._old: Leg | None = None
        self.lock = asyncio.Lock()

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
        if leg is not self.owner and leg is not self._old:
            return
        if leg is self._old and output.finish_reason is not None:
            output = msgspec.structs.replace(output, finish_reason=None, frozen=None)
        if output.index > len(self.tokens):
            self._early.append(output)
            return
        self._deliver(output)
        while self._early and self._early[0].index <= len(self.tokens):
            self._deliver(self._early.pop(0))

    def _deliver(self, output: GenerateOutput) -> None:
        seen = len(self.tokens) - output.index
        if seen > 0:
            output = msgspec.structs.replace(
                output,
                index=len(self.tokens),
                token_ids=output.token_ids[seen:],
                logprobs=output.logprobs[seen:],
            )
        if not output.token_ids and output.finish_reason is None:
            return
        if output.token_ids:
            self.tokens += output.token_ids
            self.timing.token(time.monotonic())
        if output.finish_reason is FinishReason.FROZEN:
            return
        if output.frozen is not None:
            self.frozen = output.frozen
        if output.finish_reason is not None:
            self.finished = True
        self.outputs.put_nowait(output)

    def leg_ended(self, leg: Leg) -> None:
        """A leg is over, for whatever reason."""
        if leg is self._old:
            self._fill_from_promise()
        elif leg is self.owner and leg.error is not None and not self.finished:
            self.outputs.put_nowait(leg.error)

    def _fill_from_promise(self) -> None:
        missing = self._promised[len(self.tokens) :]
        if missing:
            logger.warning("request %s: source died before %d tokens", self.request.request_id, len(missing))
            self._deliver(GenerateOutput(len(self.tokens), missing))
            while self._early and self._early[0].index <= len(self.tokens):
                self._deliver(self._early.pop(0))

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
        )

    async def close(self) -> None:
        """The client is gone or served: end every leg."""
        self.finished = True
        for leg in (self.owner, self._old):
            if leg is not None and not leg.task.done():
                with contextlib.suppress(MigrateError):
                    await leg.worker.call(WorkerOp.ABORT, self.request.request_id, timeout_s=5.0)
                leg.task.cancel()

    # Moving

    async def take_over(self, worker: Worker, frozen: Frozen) -> None:
        """Continue a frozen request on a worker (prefill hand-off). Raises; the source stays frozen."""
        old = self.owner
        leg = self._switch(self.open(worker, frozen=frozen), frozen)
        try:
            await self._first_token(leg)
        except MigrateError:
            self._switch_back(old)
            raise
        if old is not None:
            await self._release(old)

    async def migrate(self, target: Worker, mode: Mode) -> MoveRecord:
        """Move the request. Never raises: the record says what happened, the request goes on either way."""
        async with self.lock:
            source = self.owner
            begun = time.monotonic()
            name = source.worker.name if source else ""
            record = MoveRecord(self.request.request_id, name, target.name, mode, ok=False, tokens=len(self.tokens))
            if source is None or self.finished:
                return msgspec.structs.replace(record, reason="the request has ended")
            if target is source.worker:
                return msgspec.structs.replace(record, reason="the request is already there")
            source.worker.moving += 1
            target.moving += 1
            try:
                record = await self._move(source, target, record)
            except (MigrateError, asyncio.CancelledError) as error:
                record = msgspec.structs.replace(record, reason=f"{getattr(error, 'code', 'cancelled')}: {error}")
                logger.warning("request %s stays: %s", self.request.request_id, record.reason)
            finally:
                source.worker.moving -= 1
                target.moving -= 1
            return msgspec.structs.replace(record, total_s=time.monotonic() - begun)

    async def _move(self, source: Leg, target: Worker, record: MoveRecord) -> MoveRecord:
        if record.mode is Mode.REPLAY:
            return await self._replay(source, target, record)
        why = self.request.sampling.why_not_migratable()
        if why is not None:
            raise NotMigratable(why)
        request_id = self.request.request_id
        offer = self._clipped((await source.worker.call(WorkerOp.OFFER, request_id)).offer)
        known = len(self.tokens)
        leg = self.open(target, landing=offer)
        status = LandingStatus(reserved=False)
        try:
            status = await self._landed(leg)
            rounds = 1
            while record.mode is Mode.LIVE and rounds < self._max_rounds:
                newer = self._clipped((await source.worker.call(WorkerOp.OFFER, request_id)).offer)
                if len(newer.block_ids) * newer.block_size - status.landed_tokens <= 2 * newer.block_size:
                    break
                tokens = tuple(self.tokens)
                known = len(tokens)
                await target.call(WorkerOp.EXTEND, request_id, offer=newer, tokens=tokens)
                status = await self._landed(leg)
                rounds += 1
            frozen = (await source.worker.call(WorkerOp.FREEZE, request_id, timeout_s=self._deadline_s)).frozen
        except BaseException:
            await self._abandon(leg)
            raise
        if frozen is None:
            raise SessionError("the source froze the request without giving its state")
        logger.debug("request %s: %d tokens known, %d frozen", request_id, known, len(frozen.output_token_ids))
        return await self._cut_over(source, leg, frozen, status, record)

    async def _cut_over(
        self, source: Leg, leg: Leg, frozen: Frozen, status: LandingStatus, record: MoveRecord
    ) -> MoveRecord:
        request_id = self.request.request_id
        gap = self.timing.median_gap()
        try:
            await leg.worker.call(WorkerOp.COMMIT, request_id, frozen=frozen, timeout_s=self._deadline_s)
            self._switch(leg, frozen)
            await self._first_token(leg)
        except BaseException:
            await self._abandon(leg)
            self._switch_back(source)
            with contextlib.suppress(MigrateError):
                await source.worker.call(WorkerOp.RESUME, request_id)
            raise
        downtime = self.timing.gaps[-1] if self.timing.gaps else 0.0
        await self._release(source)
        self.moves += 1
        with contextlib.suppress(MigrateError):
            status = (await leg.worker.call(WorkerOp.LANDING, request_id)).landing or status
        return msgspec.structs.replace(
            record,
            ok=True,
            rounds=status.rounds,
            bytes=status.bytes,
            descriptors=status.descriptors,
            lane=status.lane,
            downtime_s=downtime,
            added_stall_s=max(0.0, downtime - gap),
        )

    async def _replay(self, source: Leg, target: Worker, record: MoveRecord) -> MoveRecord:
        frozen = (await source.worker.call(WorkerOp.FREEZE, self.request.request_id)).frozen
        if frozen is None:
            raise SessionError("the source froze the request without giving its state")
        gap = self.timing.median_gap()
        request = msgspec.structs.replace(self.request, output_token_ids=frozen.output_token_ids)
        leg = self._switch(Leg(target, Generate(request), self), frozen)
        try:
            await self._first_token(leg)
        except BaseException:
            await self._abandon(leg)
            self._switch_back(source)
            await source.worker.call(WorkerOp.RESUME, self.request.request_id)
            raise
        downtime = self.timing.gaps[-1] if self.timing.gaps else 0.0
        await self._release(source)
        self.moves += 1
        return msgspec.structs.replace(
            record, ok=True, downtime_s=downtime, added_stall_s=max(0.0, downtime - gap)
        )

    def _clipped(self, offer: KVOffer | None) -> KVOffer:
        """The source may be some tokens ahead of us: offer only what our tokens reach."""
        if offer is None:
            raise SessionError("the source answered without an offer")
        reach = len(self.request.prompt_token_ids) + len(self.tokens) - 1
        count = min(offer.num_tokens, reach) // offer.block_size
        return msgspec.structs.replace(
            offer, block_ids=offer.block_ids[:count], num_tokens=count * offer.block_size
        )

    async def _landed(self, leg: Leg) -> LandingStatus:
        end = time.monotonic() + self._deadline_s
        while time.monotonic() < end:
            if leg.ended.is_set():
                raise leg.error or SessionError("the target ended the landing")
            try:
                reply = await leg.worker.call(WorkerOp.LANDING, self.request.request_id)
            except RequestNotFound:
                await asyncio.sleep(_POLL_S)
                continue
            if reply.landing is not None and reply.landing.reserved and not reply.landing.in_flight:
                return reply.landing
            await asyncio.sleep(_POLL_S)
        raise DeadlineExceeded(f"blocks did not land on {leg.worker.name} within {self._deadline_s:g} s")

    def _switch(self, leg: Leg, frozen: Frozen) -> Leg:
        self._old, self.owner = self.owner, leg
        self._promised = frozen.output_token_ids
        if self._old is not None and self._old.ended.is_set():
            self._fill_from_promise()
        return leg

    def _switch_back(self, source: Leg | None) -> None:
        self.owner, self._old = source, None
        self._early.clear()

    async def _first_token(self, leg: Leg) -> None:
        waiting = [asyncio.ensure_future(leg.started.wait()), asyncio.ensure_future(leg.ended.wait())]
        done, pending = await asyncio.wait(
            waiting, timeout=self._deadline_s, return_when=asyncio.FIRST_COMPLETED
        )
        for task in pending:
            task.cancel()
        if leg.started.is_set():
            return
        if not done:
            raise DeadlineExceeded(f"no token from worker {leg.worker.name} within {self._deadline_s:g} s")
        raise leg.error or WorkerLost(f"worker {leg.worker.name} ended before its first token")

    async def _abandon(self, leg: Leg) -> None:
        with contextlib.suppress(MigrateError):
            await leg.worker.call(WorkerOp.ABORT, self.request.request_id, timeout_s=5.0)
        leg.task.cancel()

    async def _release(self, leg: Leg) -> None:
        try:
            await leg.worker.call(WorkerOp.RELEASE, self.request.request_id)
            await asyncio.wait_for(leg.ended.wait(), 5.0)
        except (MigrateError, TimeoutError) as error:
            # The worker's own lease frees the blocks; the client is already served by the new owner.
            logger.warning("releasing %s on %s: %s", self.request.request_id, leg.worker.name, error)
        self._fill_from_promise()
        self._old = None
