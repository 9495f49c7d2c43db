# SPDX-License-Identifier: Apache-2.0
"""Lives that arrive from other workers: they begin here, run in the engine and wait for a reader.

A task reads each life from the engine, independent of its reader: the previous worker (``attach``), or a handler here
that has the frontend's repeat (``claim``). A life without a reader is given up after ``orphan_s``; until then a call
about a failed life gets the reason.

Threading: one asyncio loop.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress

import msgspec

from components.engine.kv import KVOffer, RequestId
from components.engine.protocol import Engine, FinishReason, GenerateOutput, GenerateRequest
from components.errors import InvalidRequest, MigrateError, RequestNotFound, SessionError
from components.migration.events import Event
from components.migration.legs import Arrival
from components.migration.messages import Attached, Life, Owner, Ticket, WorkerCall, WorkerOp
from components.migration.peers import Peers
from components.migration.suspects import Suspects
from components.migration.tasks import Spawn

logger = logging.getLogger(__name__)


class Arrivals:
    """See the module docstring."""

    def __init__(
        self,
        engine: Engine,
        fingerprint: str,
        peers: Peers,
        suspects: Suspects,
        events: Counter[Event],
        spawn: Spawn,
    ) -> None:
        self.fingerprint = fingerprint
        """Of model, weights, runner and KV layout; a life begins only with an equal one."""
        self.lives: dict[Life, Arrival] = {}
        self.tokens_total = 0
        """Tokens that this engine has made for arrivals."""
        self._engine = engine
        self._peers = peers
        self._suspects = suspects
        self._events = events
        self._spawn = spawn

    def reserve(self, ticket: Ticket, offer: KVOffer | None) -> None:
        """Begin a life here: reserves and fills blocks; no token comes before ``commit``."""
        if ticket.fingerprint != self.fingerprint:
            raise InvalidRequest(
                "model, weights, runner or KV layout of the two workers differ, or the tensor-parallel size of a model "
                "whose KV caches do not divide into heads"
            )
        if ticket.life in self.lives:
            raise SessionError(f"life {ticket.life:x} of request {ticket.request_id} is here already")
        self._suspects.require_few(ticket.request_id)
        engine_id = RequestId(f"{ticket.request_id}~{ticket.life:x}")
        leg = Arrival(
            ticket.request_id,
            engine_id,
            ticket.prompt_token_ids,
            lambda: ticket.native,
            attached=ticket.attached,
            max_tokens=ticket.max_tokens,
            trace=ticket.trace,
            order=ticket.order,
            tried=frozenset(ticket.tried),
            life=ticket.life,
            before=ticket.output_token_ids,
        )
        self.lives[leg.life] = leg
        request = GenerateRequest(
            engine_id,
            ticket.prompt_token_ids,
            output_token_ids=ticket.output_token_ids,
            landing=offer,
            native=ticket.native,
        )
        self._spawn(self._run(leg, request))

    async def _run(self, leg: Arrival, request: GenerateRequest) -> None:
        try:
            async for output in self._suspects.watched(self._engine.generate(request)):
                if output.finish_reason is not FinishReason.FROZEN:
                    self.tokens_total += len(output.token_ids)
                if output.committed is not None:
                    leg.before, leg.committed = output.committed, True
                    self._events[Event.LANDED] += 1
                    output = msgspec.structs.replace(output, committed=None)
                leg.add(output)
        except MigrateError as error:
            self._fail(leg, error)
        except Exception as error:
            logger.exception("request %s ended in this engine", leg.request_id)
            self._fail(leg, MigrateError(str(error)))
        finally:
            leg.over |= leg.away is None
            if not leg.committed:
                self._events[Event.NOT_LANDED] += 1
                leg.refused = leg.refused or RequestNotFound(f"request {leg.request_id} has ended before its commit")

    def _fail(self, leg: Arrival, error: MigrateError) -> None:
        """Calls about it get the reason until it is given up."""
        leg.refused = None if leg.committed else error
        leg.add(GenerateOutput(len(leg.known()), finish_reason=FinishReason.ERROR, error=(error.code, str(error))))

    def get(self, request_id: RequestId, life: Life) -> Arrival:
        """Raise ``RequestNotFound`` for a life that is not here."""
        leg = self.lives.get(life)
        if leg is None or leg.request_id != request_id:
            raise RequestNotFound(f"life {life:x} of request {request_id} is not here")
        return leg

    async def attach(
        self, request_id: RequestId, life: Life, index: int, token_ids: Sequence[int] = ()
    ) -> AsyncGenerator[Attached, None]:
        """Stream a life to its previous worker, or to one that has its repeat with ``token_ids``; see ``Attached``."""
        leg = self.get(request_id, life)
        if leg.refused is not None:
            raise leg.refused
        index = leg.start(index, token_ids)
        yield Attached()
        async with aclosing(leg.read(index)) as stream:
            async for output in stream:
                if output.finish_reason is FinishReason.FROZEN and leg.away is not None:
                    yield Attached(moved=leg.away.owner)
                    return
                yield Attached((output,))
            if leg.away is not None:
                yield Attached(moved=leg.away.owner)

    def claim(self, request_id: RequestId, token_ids: Sequence[int], owner: Owner | None) -> tuple[Arrival, int] | None:
        """The life here that continues exactly these tokens, and the output token to begin with.

        With an announced owner only its life counts: another one here is left from a failed move, and its source may
        soon end it. Without an announcement the source has died. The prompt alone is a new request: clients choose ids.
        """
        for leg in self.lives.values():
            if owner is not None and owner.life != leg.life:
                continue
            if leg.request_id == request_id and leg.committed and leg.away is None:
                index = leg.index_after(token_ids)
                if index:
                    return leg, index
        return None

    async def give_up(self, leg: Arrival) -> None:
        """End a life here, and its successor if it has moved on."""
        self.lives.pop(leg.life, None)
        with suppress(MigrateError):
            if leg.away is not None:
                owner = leg.away.owner
                await self._peers.call(owner.instance, abort(leg.request_id, owner.life))
            else:
                await self._engine.abort(leg.engine_id)

    async def abort(self, request_id: RequestId) -> bool:
        """End a request without client. False: none of its lives arrived from another worker."""
        for leg in [leg for leg in self.lives.values() if leg.request_id == request_id]:
            await self.give_up(leg)
            return True
        return False

    def sweep(self, orphan_s: float) -> None:
        """End a life without reader for ``orphan_s``."""
        now = time.monotonic()
        for leg in list(self.lives.values()):
            if leg.unread_since is None or now - leg.unread_since < orphan_s:
                continue
            if not leg.over and leg.away is None:
                self._events[Event.ORPHANED] += 1
                logger.warning("request %s is given up: nobody has asked for its tokens", leg.request_id)
            # No call finds it from here on.
            del self.lives[leg.life]
            if leg.away is None:
                self._spawn(self.give_up(leg))


def abort(request_id: RequestId, life: Life) -> WorkerCall:
    """The call that ends a life at its owner."""
    return WorkerCall(WorkerOp.ABORT, request_id, life)
