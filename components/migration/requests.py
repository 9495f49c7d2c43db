# SPDX-License-Identifier: Apache-2.0
"""The streams of one worker's handlers, wherever the tokens come from.

A handler's call of the engine goes through ``serve``: as long as nothing moves, it hands the engine's own items on.
When the life has gone elsewhere, ``serve`` goes on with the next owner's outputs (relay) until the frontend can be
asked to repeat the request (``Repeat``), which then reaches the owner itself, that goes on with the life that came to
it (``Arrivals.claim``), or a worker that knows the owner (``repeated``).

Threading: one asyncio loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, suppress
from typing import TypeVar

from components.engine.kv import RequestId
from components.engine.protocol import Engine, GenerateOutput
from components.errors import MigrateError, RequestNotFound, WorkerLost
from components.migration.arrivals import Arrivals, abort
from components.migration.events import Event
from components.migration.faces import PROTOCOL_FACE, Face
from components.migration.legs import Arrival, Away, Handler, Leg, new_life
from components.migration.messages import Attached, Owner
from components.migration.options import Options
from components.migration.owners import Owners
from components.migration.pace import Pace
from components.migration.parting import Parting
from components.migration.peers import Peers, follow
from components.migration.repeats import Repeat, Repeats
from components.migration.suspects import Suspects
from components.migration.tasks import CutOvers, Tasks

logger = logging.getLogger(__name__)
_SWEEP_S = 1.0

T = TypeVar("T")


class Requests:
    """See the module docstring."""

    def __init__(self, engine: Engine, peers: Peers, instance: int, fingerprint: str, options: Options) -> None:
        self.engine = engine
        self.peers = peers
        self.instance = instance
        self.options = options
        self.legs: dict[RequestId, Leg] = {}
        """Stock lives by the frontend's id, also those that are relayed."""
        self.closing = False
        """True when the process is about to end: requests that have left stay with their owners."""
        self.handoffs: Counter[str] = Counter()
        """Outcomes of hand-overs from prefill to decode workers."""
        self.events: Counter[Event] = Counter()
        self.cut_overs = CutOvers()
        self.pace = Pace()
        self.spawn = Tasks().spawn
        self.owners = Owners(peers, instance)
        self._repeats = Repeats(peers, self.owners, self.spawn, options)
        self.suspects = Suspects(peers, instance, self._in_flight)
        self.arrivals = Arrivals(engine, fingerprint, peers, self.suspects, self.events, self.spawn)
        self._tokens = 0
        """Tokens that handlers got from this worker's own engine."""

    @property
    def tokens_total(self) -> int:
        """Tokens that this worker's engine has made."""
        return self._tokens + self.arrivals.tokens_total

    async def serve(self, leg: Leg, stream: AsyncIterator[T], face: Face[T]) -> AsyncGenerator[T, None]:
        """The items of a request for the handler that has it. Raises ``Repeat`` when the frontend is to repeat it."""
        self._enter(leg)
        parting: Parting[T] | None = None
        last = False
        try:
            async for item in stream:
                taken = self._take(leg, item, face)
                if taken is not None:
                    yield taken
                last = face.finished(item)
                if last or leg.may_part:
                    break
            if not last and leg.may_part:
                parting = Parting(leg, stream)
                async with aclosing(parting.items()) as items:
                    async for item in items:
                        taken = self._take(leg, item, face)
                        if taken is not None:
                            yield taken
                        last = face.finished(item)
                        if last:
                            break
            if leg.away is None:
                leg.over = True
                return
            async for output in self._relay(leg):
                yield face.make(output)
        finally:
            await self._leave(leg)
            if parting is not None:
                await parting.close()

    def _take(self, leg: Leg, item: T, face: Face[T]) -> T | None:
        """What the handler gets of an item: all, or nothing of the end of a life that goes on elsewhere."""
        if leg.away is not None and face.finished(item):
            rest = face.without_end(item)
            if rest is None:
                return None
            item = rest
        if not isinstance(leg, Arrival):
            leg.note(face.tokens(item))
            self._tokens += len(face.tokens(item))
        return item

    async def _go_on(self, leg: Arrival, index: int) -> AsyncGenerator[GenerateOutput, None]:
        """``serve`` for a life that came from elsewhere, from output token ``index`` on."""
        async with aclosing(leg.read(index)) as own, aclosing(self.serve(leg, own, PROTOCOL_FACE)) as stream:
            async for output in stream:
                yield output

    async def _relay(self, leg: Leg) -> AsyncGenerator[GenerateOutput, None]:
        away = leg.away
        if away is None:
            return
        lost = away.cut[len(leg.tokens) :] if not isinstance(leg, Arrival) else ()
        if lost:
            yield GenerateOutput(index=len(leg.tokens), token_ids=lost)
            leg.note(lost)
        made = list(away.cut)
        try:
            async with aclosing(away.relay):
                output = away.first or await anext(away.relay, None)
                while output is not None:
                    made.extend(output.token_ids)
                    leg.over = output.finish_reason is not None
                    yield output
                    if leg.over:
                        return
                    if self._repeats.due(leg, away, len(made), self.closing):
                        self.events[Event.REPEATED] += 1
                        raise Repeat(f"request {leg.request_id} runs at another worker")
                    output = await anext(away.relay, None)
            raise WorkerLost("the relay was closed")
        except Repeat:
            leg.over = True
            raise
        except (WorkerLost, RequestNotFound) as error:
            logger.warning("request %s: %s", leg.request_id, error)
            leg.over = True
            self.owners.forget(leg.request_id)
            if self.closing:
                raise Repeat(str(error)) from error
        # Its owner is lost. All that it needs is here: it is computed again here, after the tokens that have left.
        async with aclosing(self._go_on(self._again(leg, made), len(made))) as stream:
            async for output in stream:
                yield output

    def _again(self, leg: Leg, made: list[int]) -> Arrival:
        ticket = leg.ticket(new_life(), self.arrivals.fingerprint, made, leg.order)
        self.arrivals.reserve(ticket, None)
        again = self.arrivals.lives[ticket.life]
        again.committed = True
        self.events[Event.RECOMPUTED] += 1
        return again

    def _in_flight(self) -> list[RequestId]:
        """Requests that are in this worker's engine."""
        legs = [*self.legs.values(), *self.arrivals.lives.values()]
        return [leg.request_id for leg in legs if leg.away is None and not leg.over]

    def _enter(self, leg: Leg) -> None:
        self.suspects.require_few(leg.request_id)
        leg.handler = Handler.SERVES
        leg.tried |= {self.instance}
        if not isinstance(leg, Arrival) and (older := self.legs.setdefault(leg.request_id, leg)) is not leg:
            # Clients choose ids. Calls of the engine by this one mean the older request, and its end ends both.
            leg.fixed = older.fixed = "another request here has its id"

    async def _leave(self, leg: Leg) -> None:
        if not isinstance(leg, Arrival) and self.legs.get(leg.request_id) is leg:
            del self.legs[leg.request_id]
        leg.handler = Handler.GONE
        if leg.away is not None:
            await self.let_go(leg, leg.away)
        elif isinstance(leg, Arrival) and not (leg.over or self.closing):
            # The client has gone.
            self.spawn(self.arrivals.give_up(leg))

    async def let_go(self, leg: Leg, away: Away) -> None:
        """Nobody here passes on the tokens of a life that has left, or nobody does any more."""
        await away.relay.aclose()
        if leg.handler is Handler.GONE and not (leg.over or self.closing):
            # The client has gone.
            self.spawn(self.peers.call(away.owner.instance, abort(leg.request_id, away.owner.life)))

    def prompt_tokens(self, request_id: RequestId, token_ids: Sequence[int]) -> int:
        """How many of a request's tokens are its prompt; those behind them were delivered before it was repeated."""
        owner = self.owners.get(request_id)
        if (claimed := self.arrivals.claim(request_id, token_ids, owner)) is not None:
            return len(claimed[0].prompt_token_ids)
        return (owner.prompt_tokens if owner is not None else 0) or len(token_ids)

    def repeated(
        self, request_id: RequestId, token_ids: Sequence[int], native: Callable[[], bytes], max_tokens: int | None
    ) -> AsyncGenerator[GenerateOutput, None] | None:
        """What follows these tokens of a request that the frontend has sent again; None: it is a new one here."""
        owner = self.owners.get(request_id)
        if (claimed := self.arrivals.claim(request_id, token_ids, owner)) is not None:
            leg, index = claimed
            self.events[Event.ADOPTED] += 1
            return self._go_on(leg, index)
        if owner is None or not owner.repeated_by(token_ids):
            return None
        self.events[Event.PASSED_ON] += 1
        here = Leg(
            request_id,
            request_id,
            tuple(token_ids),
            native,
            max_tokens=max_tokens,
            order=owner.order,
            tried=frozenset(owner.tried),
        )
        return self._relayed(here, owner)

    def _relayed(self, here: Leg, owner: Owner) -> AsyncGenerator[GenerateOutput, None]:
        """The outputs of a request whose repeat is here, though another worker owns it."""

        def moved(heir: Owner) -> None:
            away.owner = heir

        relay = follow(self.attach_to, owner, here.request_id, 0, moved, tuple(here.prompt_token_ids))
        here.away = away = Away(owner, None, relay, cut=())
        return self.serve(here, _nothing(), PROTOCOL_FACE)

    async def abort(self, request_id: RequestId) -> bool:
        """The client has gone. False: this is a stock request of the engine's."""
        leg = self.legs.get(request_id)
        if leg is not None and leg.away is None:
            return False
        if self.closing:
            return True
        if leg is not None and leg.away is not None:
            owner = leg.away.owner
            with suppress(MigrateError):
                await self.peers.call(owner.instance, abort(request_id, owner.life))
            return True
        return await self.arrivals.abort(request_id)

    def attach_to(
        self, owner: Owner, request_id: RequestId, index: int, token_ids: tuple[int, ...] = ()
    ) -> AsyncGenerator[Attached, None]:
        """``Peers.attach``; a life that runs here is read without a network."""
        if owner.instance == self.instance:
            return self._near(owner, request_id, index, token_ids)
        return self.peers.attach(owner, request_id, index, token_ids)

    async def _near(
        self, owner: Owner, request_id: RequestId, index: int, token_ids: Sequence[int]
    ) -> AsyncGenerator[Attached, None]:
        """Read a request that is back at the worker whose handler passes its tokens on. When it leaves again, its
        tokens come over the stream that its move opens.
        """
        leg = self.arrivals.get(request_id, owner.life)
        yield Attached()
        if leg.away is not None:
            yield Attached(moved=leg.away.owner)
            return
        async with aclosing(self._go_on(leg, leg.start(index, token_ids))) as stream:
            async for output in stream:
                yield Attached((output,))

    async def sweep(self) -> None:
        """Give up what nobody reads, forget old owners; until cancelled."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            self.owners.sweep()
            self.suspects.sweep()
            self.arrivals.sweep(self.options.orphan_s)


async def _nothing() -> AsyncGenerator[GenerateOutput, None]:
    """The outputs of an engine that does not have the request."""
    nothing: tuple[GenerateOutput, ...] = ()
    for output in nothing:
        yield output
