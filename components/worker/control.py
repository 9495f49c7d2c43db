# SPDX-License-Identifier: Apache-2.0
"""The calls that a worker answers: on its ``migrate`` endpoint, for planners, the command line and peers, and on links.

Errors reach the caller as (code, message). Every call about a request names its life; see ``components.migration``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from components.engine.kv import LandingStatus, RequestId
from components.errors import InvalidRequest, MigrateError, RequestNotFound
from components.messages import pack, unpack
from components.migration.events import Event
from components.migration.legs import Arrival, Handler
from components.migration.link_owner import LinkOwner
from components.migration.messages import Attached, WorkerCall, WorkerOp, WorkerReply
from components.migration.requests import Requests
from components.timeline import mark
from components.worker.state import WorkerStatus

_POLL_S, _LONGEST_POLL_S = 0.004, 0.064
_MAX_HOLD_S = 5.0
"""Longest delay of an answer."""

Release = Callable[[RequestId], Awaitable[None]]
"""Frees blocks that a prefill worker lends under that id."""


class Control:
    """See the module docstring."""

    def __init__(
        self, requests: Requests, status: WorkerStatus, release: Release | None = None, host: str | None = None
    ) -> None:
        self._requests = requests
        self._status = status
        self._release = release
        self._links = LinkOwner(host, self.answer, self.attach) if host is not None else None

    async def serve(self, payload: Any) -> AsyncGenerator[dict[str, str], None]:
        """Answer one call, which came over Dynamo, with one item."""
        try:
            call = unpack(payload, WorkerCall)
        except MigrateError as error:
            yield pack(WorkerReply(error=(error.code, str(error))))
            return
        yield pack(await self.answer(call))

    def attach(self, call: WorkerCall) -> AsyncGenerator[Attached, None]:
        """The items of an ``ATTACH`` call, which comes over a link."""
        return self._requests.arrivals.attach(call.request_id, call.life, call.index, call.tokens)

    async def answer(self, call: WorkerCall) -> WorkerReply:
        """The reply to one call."""
        try:
            return await self._answer(call)
        except MigrateError as error:
            return WorkerReply(error=(error.code, str(error)))

    async def _answer(self, call: WorkerCall) -> WorkerReply:
        requests, engine = self._requests, self._requests.engine
        match call.op:
            case WorkerOp.RESERVE if call.ticket is not None:
                self._status.admit()
                requests.arrivals.reserve(call.ticket, call.offer)
            case WorkerOp.LANDING:
                return WorkerReply(landing=await self._landing(self._arrival(call), call.hold_s))
            case WorkerOp.EXTEND if call.offer is not None:
                leg = self._arrival(call)
                await engine.extend(leg.engine_id, call.offer, call.tokens)
                return WorkerReply(landing=await self._landing(leg, call.hold_s))
            case WorkerOp.LINK if self._links is not None:
                return WorkerReply(link=self._links.where)
            case WorkerOp.EXPECT_COMMIT:
                mark("target", "commit expected", call.request_id)
                await engine.expect_commit(self._arrival(call).engine_id, call.hold_s)
            case WorkerOp.COMMIT if call.frozen is not None:
                leg = self._arrival(call)
                mark("target", "commit", call.request_id)
                # The source's engine may have committed it before.
                early = leg.committed
                if not early:
                    leg.before, leg.committed = call.frozen.output_token_ids, True
                try:
                    await engine.commit(leg.engine_id, call.frozen)
                except BaseException:
                    leg.committed = early
                    raise
                if not early:
                    requests.events[Event.LANDED] += 1
            case WorkerOp.ABORT:
                leg = self._arrival(call)
                # Once a handler here gives it to the frontend, its source may no longer end it.
                if leg.handler is Handler.NONE:
                    await requests.arrivals.give_up(leg)
            case WorkerOp.RELEASE if self._release is not None:
                await self._release(call.request_id)
            case WorkerOp.OWNERS:
                requests.owners.learn(call.owners)
            case WorkerOp.SUSPECTS:
                requests.suspects.learn(call.suspects)
            case WorkerOp.STATUS:
                return WorkerReply(state=await self._status.report(call))
            case WorkerOp.MIGRATE:
                return WorkerReply(moves=(await self._status.move(call),))
            case WorkerOp.DRAIN:
                return WorkerReply(moves=await self._status.drain(call.timeout_s), left=self._status.left)
            case WorkerOp.UNDRAIN:
                await self._status.uncordon()
            case WorkerOp.CHECK:
                await engine.check_integrity()
            case _:
                raise InvalidRequest(f"call {call.op} lacks its arguments")
        return WorkerReply()

    def _arrival(self, call: WorkerCall) -> Arrival:
        leg = self._requests.arrivals.get(call.request_id, call.life)
        if leg.refused is not None and call.op is not WorkerOp.ABORT:
            raise leg.refused
        return leg

    async def _landing(self, leg: Arrival, hold_s: float) -> LandingStatus:
        """Progress, when the blocks are there or after ``hold_s``. The engine may not have the request yet."""
        end, poll = time.monotonic() + min(hold_s, _MAX_HOLD_S), _POLL_S
        while True:
            over = time.monotonic() >= end
            try:
                status = await self._requests.engine.landing_status(leg.engine_id, max(0.0, end - time.monotonic()))
                if status.landed or over:
                    return status
            except RequestNotFound as error:
                if leg.over:
                    raise leg.refused or error from None
                if over:
                    return LandingStatus(reserved=False, in_flight=True)
            await asyncio.sleep(poll)
            poll = min(2 * poll, _LONGEST_POLL_S)
