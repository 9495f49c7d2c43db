# SPDX-License-Identifier: Apache-2.0
"""One migration, driven by the source. The destination obeys calls that name the life that begins there.

    live            reserve, pre-copy rounds, freeze, commit, first token, release
    stop-and-copy   reserve without copying, freeze, commit all, first token, release
    replay          as stop-and-copy, but the destination is offered no blocks: it computes the KV from the tokens

Grant before freeze: the source is only frozen once the destination has granted seat and blocks. Whatever fails before
the destination's first token has come ends with the request running at the source again, and the record says why.

The frozen time is bounded by ``Limits.step_s`` and by half of the lease for which the source's engine keeps it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass

import msgspec

from components.engine.groups import whole_blocks
from components.engine.kv import Frozen, KVOffer, LandingStatus
from components.engine.protocol import GenerateOutput
from components.errors import (
    DeadlineExceeded,
    InvalidRequest,
    MigrateError,
    NotMigratable,
    RequestNotFound,
    SessionError,
)
from components.migration.legs import Arrival, Away, Handler, Leg, new_life
from components.migration.messages import Mode, MoveRecord, Owner, WorkerCall, WorkerOp, WorkerReply
from components.migration.peers import follow, short
from components.migration.requests import Requests
from components.migration.tasks import Turn
from components.timeline import mark

logger = logging.getLogger(__name__)
_LANDING_S = 1.0
"""The destination answers after this time even when blocks are still on the way."""
_ALMOST = 2
"""Blocks that may be missing at the freeze."""
_SPARE = 2 * _ALMOST
"""Blocks that are granted beyond the tokens of an offer, for those that come until the freeze."""
_AHEAD = 0.3
"""Part of a step that passes, where steps are scheduled ahead, before the destination begins to wait."""
_WAIT_STEPS = 2
"""Gaps between tokens for which the freeze waits for the end of a step."""
_HOLD_STEPS = 2.2
"""Gaps between tokens for which the destination waits for the commit: the source's steps and the way to it."""


@dataclass(frozen=True)
class Limits:
    """Bounds of one migration."""

    step_s: float = 20.0
    """Time-out of each step."""
    rounds: int = 6
    """Rounds of copying before the source is frozen anyway."""
    lease_s: float = 60.0
    """Time for which the source's engine keeps a frozen request."""

    @property
    def frozen_s(self) -> float:
        """The source goes on by itself after this time without a token from the destination."""
        return min(self.step_s, self.lease_s / 2)


def room_tokens(leg: Leg, block_size: int) -> int:
    """Tokens for which a destination has to have blocks before the source is frozen."""
    made = len(leg.known())
    room = made + _SPARE * block_size
    return len(leg.prompt_token_ids) + (room if leg.max_tokens is None else max(made, min(room, leg.max_tokens)))


async def migrate(requests: Requests, leg: Leg, target: int, mode: Mode, limits: Limits) -> MoveRecord:
    """Move a life of a request. Never raises but on cancellation: the record says what happened."""
    begun = time.monotonic()
    source, made = short(requests.instance), len(leg.known())
    record = MoveRecord(leg.request_id, source, short(target), mode, ok=False, tokens=made)
    try:
        async with leg.lock:
            if leg.away is not None or leg.over:
                raise RequestNotFound("the request has left this worker or has ended")
            if isinstance(leg, Arrival) and not leg.committed:
                raise SessionError("the request is still landing here")
            if isinstance(leg, Arrival) and leg.unread_since is not None:
                # Its repeat is on the way, or it is left from a move whose source went on: then it is no owner.
                raise SessionError("nobody reads the tokens of the request here at the moment")
            if target == requests.instance:
                raise InvalidRequest("the request is already there")
            record = await _Move(requests, leg, target, limits).run(record)
    except MigrateError as error:
        record = msgspec.structs.replace(record, code=error.code, reason=str(error))
        logger.warning("request %s stays: %s", leg.request_id, error)
    return msgspec.structs.replace(record, total_s=time.monotonic() - begun)


class _Move:
    """One attempt."""

    def __init__(self, requests: Requests, leg: Leg, target: int, limits: Limits) -> None:
        self._requests = requests
        self._engine = requests.engine
        self._leg = leg
        self._limits = limits
        leg.attempts += 1
        order = (*leg.order, leg.attempts)
        self._owner = Owner(target, new_life(), len(leg.prompt_token_ids), tuple(leg.tried), order)
        self._relay: AsyncGenerator[GenerateOutput, None] | None = None
        self._status = LandingStatus(reserved=False)
        self._downtime = 0.0
        self._frozen: Frozen | None = None
        self._away: Away | None = None

    async def run(self, record: MoveRecord) -> MoveRecord:
        """All steps. Raises ``MigrateError`` once the request is back at the source."""
        leg = self._leg
        if leg.fixed:
            raise NotMigratable(leg.fixed)
        # ``Arrival.read`` ends by itself.
        leg.may_part = not isinstance(leg, Arrival)
        gap = leg.median_gap()
        opened = asyncio.Event()
        self._mark("begun")
        first: asyncio.Future[GenerateOutput] | None = None
        try:
            live = record.mode is Mode.LIVE
            per_token = self._requests.options.kv_bytes_per_token if live else 0
            async with self._requests.pace.room(per_token * (len(leg.prompt_token_ids) + len(leg.known()))):
                await self._reserve(blocks=live)
                # The way back is open before the source stops.
                relay = follow(
                    self._requests.attach_to, self._owner, leg.request_id, -1, self._moved, opened=opened.set
                )
                self._relay = relay
                first = asyncio.ensure_future(self._first(relay))
                await self._pre_copy(rounds=self._limits.rounds if live else 0)
            await self._until(opened, first)
            async with self._requests.cut_overs.turn() as turn:
                if not self._in_a_crowd:
                    # A step of the source has just ended: all that follows can be timed from here.
                    await leg.next_token(_WAIT_STEPS * gap)
                self._mark("freeze asked")
                await self._cut_over(first, gap, record.mode, turn)
                away = self._depart(first.result())
        except BaseException:
            if self._away is not None:
                self._requests.spawn(self._left(self._away))
                raise
            if first is not None:
                first.cancel()
                # A generator that still runs cannot be closed.
                await asyncio.gather(first, return_exceptions=True)
            await asyncio.shield(self._back())
            raise
        await self._left(away)
        with contextlib.suppress(MigrateError):
            self._status = await self._landing(0.0)
        recomputed = self._status.error and not self._status.bytes
        return msgspec.structs.replace(
            record,
            ok=True,
            mode=Mode.REPLAY if recomputed else record.mode,
            code=self._status.error[0] if self._status.error else "",
            reason=self._status.error[1] if self._status.error else "",
            rounds=self._status.rounds,
            bytes=self._status.bytes,
            descriptors=self._status.descriptors,
            post_s=self._status.post_s,
            wire_s=self._status.wire_s,
            lane=self._status.lane,
            downtime_s=self._downtime,
            added_stall_s=max(0.0, self._downtime - gap),
        )

    @property
    def _in_a_crowd(self) -> bool:
        return self._requests.cut_overs.count > 1

    def _depart(self, first: GenerateOutput) -> Away:
        """The request is the destination's. Idempotent."""
        if self._away is None:
            if self._frozen is None or self._relay is None:
                raise SessionError("the destination gave a token before the commit")
            self._downtime = max(0.0, time.monotonic() - self._leg.last_token_at)
            self._away = Away(self._owner, first, self._relay, self._frozen.output_token_ids)
            self._leg.depart(self._away)
            self._mark("handed over")
        return self._away

    async def _left(self, away: Away) -> None:
        """Clean up once the request is at the destination."""
        leg = self._leg
        if leg.handler is not Handler.SERVES:
            await self._requests.let_go(leg, away)
        await self._engine.release(leg.engine_id)
        self._requests.spawn(self._requests.owners.tell(leg.request_id, away))

    async def _cut_over(self, first: asyncio.Future[GenerateOutput], gap: float, mode: Mode, turn: Turn) -> None:
        limit = self._limits.frozen_s
        announce = asyncio.ensure_future(self._hold(gap))
        commit: asyncio.Future[WorkerReply] | None = None
        try:
            async with asyncio.timeout(limit):
                if self._leg.fixed:
                    # Another one has come with its id.
                    raise NotMigratable(self._leg.fixed)
                # A replay commits less than the state.
                to = self._status.commit_to if mode is not Mode.REPLAY else None
                frozen = self._frozen = await self._engine.freeze(self._leg.engine_id, to, limit)
                self._mark("frozen")
                if to is not None:
                    # The destination has the commit already.
                    turn.end()
                given = _without_blocks(frozen) if mode is Mode.REPLAY else frozen
                given = msgspec.structs.replace(given, use_within_s=limit)
                commit = asyncio.ensure_future(self._call(WorkerOp.COMMIT, frozen=given))
                await asyncio.wait((first, commit), return_when=asyncio.FIRST_COMPLETED)
                if not first.done():
                    commit.result()
                output = await asyncio.shield(first)
                if output.error is not None:
                    raise SessionError(f"the destination ended the request: {': '.join(output.error)}")
        except TimeoutError as error:
            if self._away is None:
                raise DeadlineExceeded(f"no token from {short(self._owner.instance)} within {limit:g} s") from error
        finally:
            announce.cancel()
            if commit is not None:
                # With a token from there the answer is known, and nobody waits for it.
                self._requests.spawn(_ended(commit))

    async def _first(self, relay: AsyncGenerator[GenerateOutput, None]) -> GenerateOutput:
        output = await anext(relay)
        self._mark("first token")
        if self._frozen is not None and output.error is None:
            # At once: each further turn of a busy loop lengthens the client's gap.
            self._depart(output)
        return output

    def _mark(self, what: str) -> None:
        mark("source", what, self._leg.request_id)

    async def _hold(self, gap: float) -> None:
        if self._in_a_crowd:
            # Commits of a crowd come all the time: the destination never waits for one of them.
            return
        # The source finishes what it has scheduled ahead; meanwhile the destination's requests go on.
        await asyncio.sleep(_AHEAD * self._requests.options.steps_ahead * gap)
        with contextlib.suppress(MigrateError):
            if gap:
                self._mark("commit announced")
                await self._call(WorkerOp.EXPECT_COMMIT, hold_s=_HOLD_STEPS * gap)

    async def _back(self) -> None:
        """Whatever was reached: the destination forgets the life, the source goes on."""
        if self._relay is not None:
            with contextlib.suppress(MigrateError):
                await self._relay.aclose()
        with contextlib.suppress(MigrateError):
            await self._engine.resume(self._leg.engine_id)
        with contextlib.suppress(MigrateError):
            await self._call(WorkerOp.ABORT)

    def _moved(self, owner: Owner) -> None:
        self._owner = owner
        if self._leg.away is not None:
            # Workers that know the previous owner may not know this one yet.
            self._leg.away.owner, self._leg.away.told, self._leg.away.told_at = owner, frozenset(), 0.0

    async def _until(self, opened: asyncio.Event, first: asyncio.Future[GenerateOutput]) -> None:
        waiting = asyncio.ensure_future(opened.wait())
        try:
            await asyncio.wait((waiting, first), timeout=self._limits.step_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        if first.done():
            first.result()
            raise SessionError("the destination gave a token before the commit")
        if not opened.is_set():
            raise DeadlineExceeded(
                f"{short(self._owner.instance)} did not take a reader within {self._limits.step_s:g} s"
            )

    async def _reserve(self, blocks: bool) -> None:
        """Ask for a seat and blocks."""
        leg = self._leg
        offer = await self._offer(blocks)
        ticket = leg.ticket(self._owner.life, self._requests.arrivals.fingerprint, leg.known(), self._owner.order)
        await self._call(WorkerOp.RESERVE, ticket=ticket, offer=offer)

    async def _pre_copy(self, rounds: int) -> None:
        """Wait for seat and blocks; copy full ones while the source decodes, until about one block is left."""
        leg = self._leg
        status = await self._landed()
        for _ in range(1, rounds):
            offer = await self._offer(True)
            if offer.num_tokens - status.landed_tokens <= _ALMOST * offer.block_size:
                break
            call = await self._call(WorkerOp.EXTEND, offer=offer, tokens=tuple(leg.known()), hold_s=_LANDING_S)
            status = call.landing if call.landing is not None and call.landing.landed else await self._landed()
        self._status = status

    async def _offer(self, blocks: bool) -> KVOffer:
        """What the engine offers, as far as the tokens reach that have left it."""
        leg = self._leg
        offer = await self._engine.offer(leg.engine_id)
        reach = len(leg.prompt_token_ids) + len(leg.known()) - 1
        room = room_tokens(leg, offer.block_size)
        return msgspec.structs.replace(whole_blocks(offer, reach if blocks else 0), room_tokens=room)

    async def _landed(self) -> LandingStatus:
        """Asks once for each second: the destination answers when the blocks are there."""
        end = time.monotonic() + self._limits.step_s
        while time.monotonic() < end:
            status = await self._landing(_LANDING_S)
            if status.landed:
                return status
        raise DeadlineExceeded(f"blocks did not land on {short(self._owner.instance)} within {self._limits.step_s:g} s")

    async def _landing(self, hold_s: float) -> LandingStatus:
        return (await self._call(WorkerOp.LANDING, hold_s=hold_s)).landing or LandingStatus(reserved=False)

    async def _call(self, op: WorkerOp, **more: object) -> WorkerReply:
        call = WorkerCall(op, self._leg.request_id, self._owner.life, **more)  # type: ignore[arg-type]
        return await self._requests.peers.call(self._owner.instance, call, self._limits.step_s)


async def _ended(call: asyncio.Future[WorkerReply]) -> None:
    with contextlib.suppress(MigrateError):
        await call


def _without_blocks(frozen: Frozen) -> Frozen:
    return msgspec.structs.replace(frozen, offer=whole_blocks(frozen.offer, 0), checksums=(), checked=())
