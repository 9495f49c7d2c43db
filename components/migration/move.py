# SPDX-License-Identifier: Apache-2.0
"""The procedure of one migration, over the calls of ``components.engine.protocol``.

    live            offer, land, (extend, land)*, freeze, commit the tail, switch, release
    stop-and-copy   freeze, commit all, switch, release
    replay          freeze, recompute at the target, switch, release

Every step has ``Stream.deadline_s``. Whatever fails before the target's first token has reached the client ends
with the request running at the source again; the record then says why.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

import msgspec

from components.engine.protocol import Frozen, KVOffer, LandingStatus
from components.errors import DeadlineExceeded, MigrateError, NotMigratable, RequestNotFound, SessionError
from components.messages import EventKind, Generate, Mode, MoveRecord, WorkerOp
from components.router.leg import Leg
from components.router.stream import Stream
from components.router.workers import Worker

logger = logging.getLogger(__name__)
_LANDING_S = 1.0
"""The target answers after this time even when blocks are still on the way."""
_HOLD_STEPS = 1.25
"""Gaps between tokens for which the target waits for the commit: a step of the source and the way to here."""


async def hand_over(stream: Stream, worker: Worker, frozen: Frozen) -> None:
    """Continue a frozen request on a worker (prefill to decode). Raises; the source then stays frozen."""
    old = stream.owner
    leg = stream.open(worker, frozen=frozen)
    stream.switch(leg, frozen)
    try:
        await stream.first_token(leg)
    except MigrateError:
        await stream.abandon(leg)
        stream.switch_back(old)
        raise
    if old is not None:
        await stream.release(old)


async def migrate(stream: Stream, target: Worker, mode: Mode, max_rounds: int, planned_source: str = "") -> MoveRecord:
    """Move a request. Never raises: the record says what happened, the request goes on either way."""
    async with stream.lock:
        source = stream.owner
        begun = time.monotonic()
        record = MoveRecord(
            stream.request.request_id,
            source.worker.name if source else "",
            target.name,
            mode,
            ok=False,
            tokens=len(stream.tokens),
        )
        if source is None or stream.finished:
            return msgspec.structs.replace(record, reason="the request has ended")
        if target is source.worker:
            return msgspec.structs.replace(record, reason="the request is already there")
        if planned_source and not source.worker.name.endswith(planned_source):
            return msgspec.structs.replace(record, reason=f"the request has left worker {planned_source}")
        if source.worker.role == "prefill":
            return msgspec.structs.replace(record, reason="the request is still in prefill")
        stream.keep_within(source.worker.lease_s)
        source.worker.moving += 1
        target.moving += 1
        try:
            record = await _Move(stream, source, target, max_rounds).run(record)
            stream.moves += 1
        except (MigrateError, asyncio.CancelledError) as error:
            record = msgspec.structs.replace(record, reason=f"{getattr(error, 'code', 'cancelled')}: {error}")
            logger.warning("request %s stays: %s", record.request_id, record.reason)
        finally:
            source.worker.moving -= 1
            target.moving -= 1
        return msgspec.structs.replace(record, total_s=time.monotonic() - begun, ended_at=time.time())


class _Move:
    """One attempt."""

    def __init__(self, stream: Stream, source: Leg, target: Worker, max_rounds: int) -> None:
        self._stream = stream
        self._source = source
        self._target = target
        self._max_rounds = max_rounds
        self._request_id = stream.request.request_id
        self._status = LandingStatus(reserved=False)
        self._announcing: asyncio.Future[None] | None = None

    async def run(self, record: MoveRecord) -> MoveRecord:
        """All steps. Raises ``MigrateError`` once the request is back at the source."""
        stream = self._stream
        if record.mode is not Mode.REPLAY:
            why = stream.request.sampling.why_not_migratable()
            if why is not None:
                raise NotMigratable(why)
        leg: Leg | None = None
        frozen: Frozen | None = None
        try:
            if record.mode is Mode.LIVE:
                leg = await self._pre_copy()
            gap = stream.timing.median_gap()
            if leg is not None:
                self._announce(gap)
            frozen = await self._freeze()
            if record.mode is Mode.REPLAY:
                request = msgspec.structs.replace(stream.request, output_token_ids=frozen.output_token_ids)
                leg = Leg(self._target, Generate(request), stream)
            elif leg is None:
                leg = stream.open(self._target, frozen=frozen)
            else:
                await self._target.call(WorkerOp.COMMIT, self._request_id, frozen=frozen, timeout_s=stream.deadline_s)
            stream.switch(leg, frozen)
            downtime = await stream.first_token(leg)
        except BaseException:
            await self._back(leg)
            raise
        await stream.release(self._source)
        with contextlib.suppress(MigrateError):
            reply = await self._target.call(WorkerOp.LANDING, self._request_id)
            self._status = reply.landing or self._status
        # The target computed what did not arrive: with no block at all, that is a replay.
        recomputed = self._status.error and not self._status.bytes
        return msgspec.structs.replace(
            record,
            ok=True,
            mode=Mode.REPLAY if recomputed else record.mode,
            reason=": ".join(self._status.error) if self._status.error else "",
            rounds=self._status.rounds,
            bytes=self._status.bytes,
            descriptors=self._status.descriptors,
            post_s=self._status.post_s,
            wire_s=self._status.wire_s,
            lane=self._status.lane,
            downtime_s=downtime,
            added_stall_s=max(0.0, downtime - gap),
        )

    async def _back(self, leg: Leg | None) -> None:
        """Whatever was reached: the target forgets the request, the source goes on."""
        stream = self._stream
        if leg is not None:
            await stream.abandon(leg)
        if stream.owner is leg:
            stream.switch_back(self._source)
        with contextlib.suppress(MigrateError):
            await self._source.worker.call(WorkerOp.RESUME, self._request_id)

    async def _pre_copy(self) -> Leg:
        """Copy full blocks while the source decodes, until what is left is about one block."""
        offer = await self._offer()
        self._stream.note(EventKind.COPYING, self._target)
        leg = self._stream.open(self._target, landing=offer)
        try:
            status = await self._landed(leg)
            for _ in range(1, self._max_rounds):
                offer = await self._offer()
                if offer.num_tokens - status.landed_tokens <= 2 * offer.block_size:
                    break
                await self._target.call(
                    WorkerOp.EXTEND, self._request_id, offer=offer, tokens=tuple(self._stream.tokens)
                )
                status = await self._landed(leg)
        except BaseException:
            await self._stream.abandon(leg)
            raise
        self._status = status
        return leg

    async def _offer(self) -> KVOffer:
        """The source may be some tokens ahead of us: keep only what our tokens reach."""
        offer = (await self._source.worker.call(WorkerOp.OFFER, self._request_id)).offer
        if offer is None:
            raise SessionError("the source answered without an offer")
        reach = len(self._stream.request.prompt_token_ids) + len(self._stream.tokens) - 1
        count = min(offer.num_tokens, reach) // offer.block_size
        return msgspec.structs.replace(offer, block_ids=offer.block_ids[:count], num_tokens=count * offer.block_size)

    def _announce(self, gap: float) -> None:
        """Have the target wait between two steps for the commit, while the source ends the step in flight."""

        async def announce() -> None:
            with contextlib.suppress(MigrateError):
                await self._target.call(
                    WorkerOp.EXPECT_COMMIT,
                    self._request_id,
                    hold_s=_HOLD_STEPS * gap,
                    timeout_s=self._stream.deadline_s,
                )

        self._announcing = asyncio.ensure_future(announce())

    async def _freeze(self) -> Frozen:
        reply = await self._source.worker.call(WorkerOp.FREEZE, self._request_id, timeout_s=self._stream.deadline_s)
        if reply.frozen is None:
            raise SessionError("the source froze the request without giving its state")
        self._stream.note(EventKind.FROZEN, self._source.worker)
        return reply.frozen

    async def _landed(self, leg: Leg) -> LandingStatus:
        """Asks once for each round: the target answers when the blocks are there."""
        end = time.monotonic() + self._stream.deadline_s
        ended = asyncio.ensure_future(leg.ended.wait())
        try:
            while time.monotonic() < end:
                call = leg.worker.call(WorkerOp.LANDING, self._request_id, hold_s=_LANDING_S)
                asking = asyncio.ensure_future(call)
                try:
                    await asyncio.wait((asking, ended), return_when=asyncio.FIRST_COMPLETED)
                    if ended.done():
                        raise leg.error or SessionError("the target ended the landing")
                    status = asking.result().landing
                except RequestNotFound:
                    continue
                finally:
                    asking.cancel()
                if status is not None and status.landed:
                    return status
        finally:
            ended.cancel()
        raise DeadlineExceeded(f"blocks did not land on {leg.worker.name} within {self._stream.deadline_s:g} s")
