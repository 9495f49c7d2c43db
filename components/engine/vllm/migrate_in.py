# SPDX-License-Identifier: Apache-2.0
"""The destination's half: blocks and a seat, rounds of copying, the commit.

A request with a landing gets a seat and blocks when it is added, or refuses with ``NoRoom`` when it is asked for its
status. It is held in vLLM's state for requests whose KV is on the way until the commit. What cannot be copied or
proven is recomputed from the last good block. ``claims`` checks what the source says, ``copies`` has the jobs.

Threading: the engine core's thread. Errors: ``NoRoom`` and ``SessionError``; a failed copy is no error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import msgspec

from components.engine.kv import Frozen, KVOffer, LandingStatus
from components.engine.vllm.claims import Cache, Claims, require_same
from components.engine.vllm.compat.scheduler import SchedulerPort
from components.engine.vllm.control import Reply
from components.engine.vllm.copies import Copies, Flight
from components.engine.vllm.direct import Inbox
from components.engine.vllm.parts import Parts
from components.engine.vllm.ranks import Ranks
from components.engine.vllm.records import Incoming, Record, use_until
from components.errors import NoRoom, RequestNotFound, SessionError
from components.timeline import mark


class MigrateIn:
    """See the module docstring."""

    def __init__(
        self, port: SchedulerPort, wait_bytes: int, deadline_s: float, ranks: Callable[[], Ranks], inbox: Inbox
    ) -> None:
        self._port = port
        self.cache = Cache()
        self.copies = Copies(port, self.cache, wait_bytes, deadline_s, ranks, self._settled)
        self._claims = Claims(port, self.cache)
        self.why_unusable = self._claims.why_unusable
        self.inbox = inbox

    # Room

    def begin(self, record: Record, offer: KVOffer) -> None:
        """Reserve for a new request, and begin the first round."""
        record.move = Incoming(offer, self._parts())
        # ``status`` reports an offer that cannot be used.
        if self.why_unusable(offer) is None:
            self._begin_round(record, offer)

    def begin_whole(self, record: Record, frozen: Frozen, tables: Sequence[list[int]], cached_tokens: int) -> None:
        """Copy all that is lent into blocks that vLLM has given to a request, which runs afterwards."""
        parts = self._parts(tables, cached_tokens)
        until = use_until(frozen, record.born)
        record.move = Incoming(frozen.offer, parts, commit=frozen, use_until=until)
        self.copies.beside_steps(record, frozen.offer.num_tokens)

    def _parts(self, tables: Sequence[list[int]] = (), cached_tokens: int = 0) -> Parts:
        return Parts(self._port.groups, self._port.block_size, tables, cached_tokens)

    def _reserve(self, record: Record, offer: KVOffer) -> bool:
        """A seat, and blocks if the offer has tokens that our own prefix cache has not."""
        incoming, request = record.require_incoming(), record.request
        known = max(0, min(offer.num_tokens, request.num_tokens - 1))
        if not known and not offer.room_tokens:
            return self._port.seats.hold(request)
        given = self._port.reserve(request, known, offer.room_tokens)
        if given is None:
            return False
        incoming.parts = self._parts(given.tables, given.cached_tokens)
        return True

    def _no_room(self) -> NoRoom:
        return NoRoom(f"{self._port.free_blocks} free KV blocks and {self._port.seats.left()} free request slots")

    def holds(self, record: Record) -> bool:
        """True while vLLM must leave this request alone."""
        return record.incoming is not None and record.incoming.commit is None

    # Rounds

    def _begin_round(self, record: Record, offer: KVOffer) -> bool:
        """Reserve and copy whole blocks. False without room; then nothing has changed."""
        self._claims.require_usable(offer)
        if not self._reserve(record, offer):
            return False
        incoming = record.require_incoming()
        incoming.offer = offer
        self._next_round(record)
        return True

    def _next_round(self, record: Record) -> None:
        """Copy whole blocks that are new in the offer."""
        incoming = record.require_incoming()
        known = min(incoming.offer.num_tokens, record.request.num_tokens - 1)
        if incoming.parts and incoming.parts.wants(known):
            self.copies.beside_steps(record, known, whole=True)

    def extend(self, record: Record, offer: KVOffer, tokens: tuple[int, ...]) -> None:
        """Another round. Raises ``NoRoom`` when the new blocks do not fit."""
        incoming = record.require_incoming()
        self._claims.require_usable(offer)
        if incoming.job is not None:
            raise SessionError("the previous round is still being copied")
        self._claims.append(record, tokens)
        if not incoming.parts:
            if not self._begin_round(record, offer):
                raise self._no_room()
            return
        if not self._port.grow(record.request, offer.num_tokens, offer.room_tokens):
            raise self._no_room()
        self._adopt(record, offer)
        self._next_round(record)

    def _adopt(self, record: Record, offer: KVOffer) -> None:
        incoming = record.require_incoming()
        incoming.parts.refresh(self._port.tables(record.request))
        incoming.parts.adopt(incoming.offer, offer)
        incoming.offer = offer

    def status(self, record: Record) -> LandingStatus:
        """Progress. Raises ``NoRoom`` while nothing could be reserved."""
        incoming = record.incoming
        if incoming is None:
            return record.landed or LandingStatus(reserved=True)
        if not incoming.parts and not self._begin_round(record, incoming.offer):
            raise self._no_room()
        progress = self._progress(record, incoming)
        if record.grammar is not None and not record.grammar.ready:
            # The source goes on meanwhile.
            return msgspec.structs.replace(progress, in_flight=True)
        return progress

    def landing(self, record: Record, wait: bool) -> Reply | Future[Reply]:
        """``status`` as a reply; with ``wait`` it comes when the round under way has ended."""
        status, incoming = self.status(record), record.incoming
        if not wait or incoming is None or incoming.job is None:
            return Reply(landing=status)
        waiter: Future[Reply] = Future()
        incoming.waiters.append(waiter)
        return waiter

    def _answer(self, record: Record, incoming: Incoming) -> None:
        """Answer waiting calls. Reserves nothing: a caller that needs more asks again, between two steps."""
        status = record.landed or LandingStatus(reserved=True)
        if record.incoming is incoming:
            status = msgspec.structs.replace(self._progress(record, incoming), reserved=bool(incoming.parts))
        for waiter in incoming.waiters:
            waiter.set_result(Reply(landing=status))
        incoming.waiters.clear()

    def _progress(self, record: Record, incoming: Incoming) -> LandingStatus:
        return msgspec.structs.replace(
            incoming.progress,
            landed_tokens=incoming.parts.landed_tokens,
            in_flight=incoming.job is not None,
            commit_to=self.inbox.at(record.request.request_id) if incoming.commit is None else None,
            direct=record.direct is not None,
        )

    # Commit

    def commit(self, record: Record, frozen: Frozen, direct: bool = False) -> None:
        """Copy what is missing and run. Raises ``NoRoom`` when the tail does not fit; the source can resume then.

        Only the first commit does anything: the worker's, or the ``direct`` one of the source's engine.
        """
        if record.direct is not None:
            require_same(record.direct, frozen)
            return
        incoming = record.require_incoming()
        if incoming.commit is not None:
            return
        mark("target-core", "commit", record.request_id)
        offer = frozen.offer
        self._claims.require_usable(offer, frozen)
        has = record.request.num_prompt_tokens + len(frozen.output_token_ids)
        if offer.num_tokens > has:
            raise SessionError(f"the source's offer has {offer.num_tokens} tokens, the request {has}")
        self._claims.append(record, frozen.output_token_ids)
        self._claims.continue_grammar(record, frozen)
        if not incoming.parts:
            if not self._reserve(record, offer):
                raise self._no_room()
        elif not self._port.grow(record.request, offer.num_tokens):
            raise self._no_room()
        record.rng_state = frozen.rng_state
        incoming.commit, incoming.use_until = frozen, use_until(frozen, time.monotonic())
        record.direct = frozen.output_token_ids if direct else None
        if not incoming.parts:
            # Nothing to copy: the prefix cache has it, or the source had computed nothing.
            self._end(record)
            self._port.to_front(record.request)
        elif offer.num_tokens <= incoming.parts.cached_tokens:
            # The source lost its blocks (preempted): what its earlier offers named proves nothing any more.
            self._adopt(record, offer)
            self._start_over(record)
        elif incoming.job is None:
            self._copy_tail(record, frozen, may_wait=True)

    def _copy_tail(self, record: Record, frozen: Frozen, may_wait: bool) -> None:
        self._adopt(record, frozen.offer)
        self.copies.tail(record, may_wait)

    def _settled(self, flight: Flight, incoming: Incoming) -> None:
        """All workers have ended the job."""
        record, commit = flight.record, incoming.commit
        if flight.failed is not None and not all(result.quiet for result in flight.results):
            self._leave_blocks_to(flight, incoming)
        elif commit is not None and incoming.offer is not commit.offer:
            # This was a round that the commit overtook: now the tail.
            self._copy_tail(record, commit, may_wait=False)
        elif commit is not None:
            whole = incoming.parts.reaches(incoming.offer, incoming.offer.num_tokens)
            if flight.failed is not None or not whole:
                self._start_over(record)
            else:
                self._end(record)
                self._port.finish_recv(record.request, incoming.offer.num_tokens)
        self._answer(record, incoming)

    # Ends

    def _end(self, record: Record) -> None:
        mark("target-core", "landed", record.request_id)
        incoming = record.require_incoming()
        record.landed = self._progress(record, incoming)
        record.move = record.grammar = None
        self._answer(record, incoming)

    def _start_over(self, record: Record) -> None:
        """Compute everything behind the last good block."""
        incoming = record.require_incoming()
        if flight := self.copies.stop(incoming):
            self._leave_blocks_to(flight, incoming)
            return
        good = incoming.parts.good_tokens(incoming.offer)
        self._end(record)
        self._port.fail_recv(record.request, good)

    def _leave_blocks_to(self, flight: Flight, incoming: Incoming) -> None:
        """Something may still land in the blocks of a job that has failed: the request gets others."""
        record = flight.record
        flight.blocks = self._port.unreserve(record.request)
        incoming.parts = self._parts()
        if incoming.commit is not None:
            self._end(record)
            self._port.to_front(record.request)

    def finished(self, record: Record) -> None:
        """The request is about to end, and vLLM will free the blocks that it still has."""
        if (incoming := record.incoming) is None:
            return
        record.move = None
        for waiter in incoming.waiters:
            waiter.set_exception(RequestNotFound(f"request {record.request_id} has just ended"))
        self._port.seats.give_up(record.request)
        if flight := self.copies.stop(incoming):
            flight.blocks = self._port.take_blocks(record.request)
