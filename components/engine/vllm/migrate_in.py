# SPDX-License-Identifier: Apache-2.0
"""The destination's half: blocks and a seat, rounds of copying, the commit.

A request with a landing gets a seat and blocks when it is added, or refuses with ``NoRoom`` when it is asked for its
status. It is held in vLLM's state for requests whose KV is on the way until the commit. What cannot be copied or
proven is recomputed from the last good block.

No step reads blocks that a copy of the same step fills. Rounds run beside the steps. The commit's tail, if small, is
copied between two steps, within a budget of a few times what the lane took for as many bytes before (``_budget``), at
most ``MAX_WAIT_S``; a copy that takes longer goes on beside the steps, and the next ones of that source do from their
beginning. So a silent source delays the other requests of this engine once, by that budget.

Blocks belong to the jobs that name them: a request that ends, or starts over, while a job may still write leaves its
blocks to that job, and they are free when the last worker says that nothing can land in them any more.

Threading: the engine core's thread. Errors: ``NoRoom`` and ``SessionError``; a failed copy is no error.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from components.engine.groups import tables_of, why_unproven
from components.engine.protocol import AgentRef, Frozen, KVOffer, LandingStatus
from components.engine.vllm.compat.scheduler import SchedulerPort
from components.engine.vllm.control import Reply
from components.engine.vllm.direct import Inbox
from components.engine.vllm.parts import Parts
from components.engine.vllm.ranks import Ranks
from components.engine.vllm.records import Incoming, Job, JobResult, Record, StepResults, use_until
from components.errors import NoRoom, RequestNotFound, SessionError
from components.timeline import mark

MAX_WAIT_S = 0.25
"""Upper bound on the time for which a commit's copy holds up the other requests."""
_MIN_WAIT_S = 0.02
_FIRST_GUESS = 1e9
"""Bytes a second of a lane that has not copied anything yet."""


@dataclass
class _Flight:
    """A job that workers have been given."""

    job: Job
    record: Record
    results: list[JobResult] = field(default_factory=list)
    quiet: int = 0
    """Workers on which nothing can land in its blocks any more."""
    blocks: list[KVCacheBlock] = field(default_factory=list)
    """Blocks of a request that has ended or started over."""


class MigrateIn:
    """See the module docstring."""

    def __init__(
        self, port: SchedulerPort, wait_bytes: int, deadline_s: float, ranks: Callable[[], Ranks], inbox: Inbox
    ) -> None:
        self._port = port
        self._wait_bytes = wait_bytes
        self._deadline_s = deadline_s
        self._ranks = ranks
        self.inbox = inbox
        self.bytes_per_block = 0
        self.num_ranks = 0
        self.divides = False
        """Whether blocks of an engine of another tensor-parallel size can be taken. Known once the workers have been
        asked, as the size of a block and the number of ranks."""
        self.refused: Counter[str] = Counter()
        """Copies whose blocks were not used, by error code."""
        self._job_ids = itertools.count(1)
        self._new: list[Job] = []
        self._cancelled: list[int] = []
        self._flights: dict[int, _Flight] = {}
        self._bytes_per_s = _FIRST_GUESS
        self._late: set[AgentRef] = set()
        """Whose last copy was not there in time: no step waits for them until one has come."""
        self._urgent: list[Job] = []
        """Copies that the next step waits for."""
        self._gathering = False

    # A request arrives

    def begin(self, record: Record, offer: KVOffer) -> None:
        """Reserve for a request that was just added, and begin the first round."""
        record.incoming = Incoming(offer, self._parts())
        # An offer that cannot be used is said to whoever asks for the status.
        if self.why_unusable(offer) is None:
            self._begin_round(record, offer)

    def why_unusable(self, offer: KVOffer) -> str | None:
        """What is wrong with an offer, or None."""
        size, tables = self._port.block_size, tables_of(offer)
        if min(offer.num_tokens, offer.room_tokens) < 0:
            return f"it has {offer.num_tokens} tokens and needs room for {offer.room_tokens}"
        if offer.block_size != size:
            return f"its blocks have {offer.block_size} tokens, ours {size}"
        ours = [group.block_size for group in self._port.groups]
        if [table.block_size for table in tables] != ours:
            return f"its groups have blocks of {[table.block_size for table in tables]} tokens, ours {ours}"
        if not offer.agents or (len(offer.agents) != self.num_ranks and not self.divides):
            return (
                f"it is of {len(offer.agents)} tensor-parallel ranks, ours are {self.num_ranks}, and KV caches of this "
                "model do not divide into heads"
            )
        for table in tables:
            if table.first < 0 or table.past < -(-offer.num_tokens // table.block_size):
                return f"it names {table.past} blocks for {offer.num_tokens} tokens"
        return None

    def _require_usable(self, offer: KVOffer, frozen: Frozen | None = None) -> None:
        reason = self.why_unusable(offer) or (why_unproven(frozen) if frozen is not None else None)
        if reason:
            raise SessionError(f"the source's offer cannot be used: {reason}")

    def begin_whole(self, record: Record, frozen: Frozen, tables: Sequence[list[int]], local_tokens: int) -> None:
        """Copy all that is lent into blocks that vLLM has given to a request, which runs afterwards."""
        parts = self._parts(tables, local_tokens)
        until = use_until(frozen, record.born)
        record.incoming = Incoming(frozen.offer, parts, commit=frozen, use_until=until)
        self._new.append(self._job(record, frozen.offer.num_tokens))

    def _parts(self, tables: Sequence[list[int]] = (), local_tokens: int = 0) -> Parts:
        return Parts(self._port.groups, self._port.block_size, tables, local_tokens)

    def _begin_round(self, record: Record, offer: KVOffer) -> bool:
        """Reserve and copy whole blocks. False without room; then nothing has changed."""
        self._require_usable(offer)
        if not self._reserve(record, offer):
            return False
        incoming = _incoming(record)
        incoming.offer = offer
        self._next_round(record)
        return True

    def _next_round(self, record: Record) -> None:
        """Copy the whole blocks that have come to be."""
        incoming = _incoming(record)
        known = min(incoming.offer.num_tokens, record.request.num_tokens - 1)
        if incoming.parts and incoming.parts.wants(known):
            self._new.append(self._job(record, known, whole=True))

    def _reserve(self, record: Record, offer: KVOffer) -> bool:
        """A seat, and blocks if the offer has tokens that our own prefix cache has not."""
        incoming, request = _incoming(record), record.request
        known = max(0, min(offer.num_tokens, request.num_tokens - 1))
        if not known and not offer.room_tokens:
            return self._port.hold_seat(request)
        given = self._port.reserve(request, known, offer.room_tokens)
        if given is None:
            return False
        incoming.parts = self._parts(given.tables, given.local_tokens)
        return True

    def holds(self, record: Record) -> bool:
        """Must vLLM leave this request alone?"""
        return record.incoming is not None and record.incoming.commit is None

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
        status = self.status(record)
        if not wait or record.incoming is None or record.incoming.job is None:
            return Reply(landing=status)
        waiter: Future[Reply] = Future()
        record.incoming.waiters.append(waiter)
        return waiter

    def _answer(self, record: Record, incoming: Incoming) -> None:
        """Nothing is reserved here: who is not content asks again, between two steps."""
        status = record.landed or LandingStatus(reserved=True)
        if record.incoming is incoming:
            status = msgspec.structs.replace(self._progress(record, incoming), reserved=bool(incoming.parts))
        for waiter in incoming.waiters:
            waiter.set_result(Reply(landing=status))
        incoming.waiters.clear()

    def _no_room(self) -> NoRoom:
        return NoRoom(f"{self._port.free_blocks} free KV blocks and {self._port.seats_left()} free request slots")

    def _progress(self, record: Record, incoming: Incoming) -> LandingStatus:
        return LandingStatus(
            reserved=True,
            landed_tokens=incoming.parts.landed_tokens,
            in_flight=incoming.job is not None,
            rounds=incoming.rounds,
            bytes=incoming.bytes,
            descriptors=incoming.descriptors,
            post_s=incoming.post_s,
            wire_s=incoming.wire_s,
            lane=incoming.lane,
            error=incoming.error,
            commit_to=self.inbox.at(record.request.request_id) if incoming.commit is None else None,
            direct=record.direct is not None,
        )

    def extend(self, record: Record, offer: KVOffer, tokens: tuple[int, ...]) -> None:
        """Another round. Raises ``NoRoom`` when the new blocks do not fit."""
        incoming = _incoming(record)
        self._require_usable(offer)
        if incoming.job is not None:
            raise SessionError("the previous round is still being copied")
        self._append(record, tokens)
        if not incoming.parts:
            if not self._begin_round(record, offer):
                raise self._no_room()
            return
        if not self._port.grow(record.request, offer.num_tokens, offer.room_tokens):
            raise self._no_room()
        self._adopt(record, offer)
        self._next_round(record)

    def commit(self, record: Record, frozen: Frozen, direct: bool = False) -> None:
        """Copy what is missing and run. Raises ``NoRoom`` when the tail does not fit; the source can resume then.

        Only the first commit does anything: the worker's, or the ``direct`` one of the source's engine.
        """
        if record.direct is not None:
            require_same(record.direct, frozen)
            return
        incoming = _incoming(record)
        if incoming.commit is not None:
            return
        mark("target-core", "commit", record.request_id)
        offer = frozen.offer
        self._require_usable(offer, frozen)
        has = record.request.num_prompt_tokens + len(frozen.output_token_ids)
        if offer.num_tokens > has:
            raise SessionError(f"the source's offer has {offer.num_tokens} tokens, the request {has}")
        self._append(record, frozen.output_token_ids)
        self._continue_grammar(record, frozen)
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
        elif offer.num_tokens <= incoming.parts.local_tokens:
            # The source lost its blocks (preempted): what its earlier offers named proves nothing any more.
            self._adopt(record, offer)
            self._start_over(record)
        elif incoming.job is None:
            self._copy_tail(record, may_wait=True)

    def _append(self, record: Record, tokens: tuple[int, ...]) -> None:
        request = record.request
        have = request.num_output_tokens
        if tuple(request.output_token_ids) != tokens[:have]:
            raise SessionError("the source's tokens differ from those this request started with")
        if request.num_prompt_tokens + len(tokens) > self._port.max_tokens:
            raise SessionError(f"{len(tokens)} output tokens are more than max_model_len allows")
        # vLLM itself checks those that a request enters with.
        if unknown := [token for token in tokens[have:] if not 0 <= token < self._port.vocab_size]:
            raise SessionError(f"{len(unknown)} tokens are not in the model's vocabulary of {self._port.vocab_size}")
        if len(tokens) > have:
            self._port.append_tokens(request, tokens[have:])
            record.needs_install = True
        if record.grammar is not None and record.grammar.ready:
            record.grammar.catch_up(request.output_token_ids)

    def _continue_grammar(self, record: Record, frozen: Frozen) -> None:
        if record.grammar is None:
            return
        record.grammar.catch_up(record.request.output_token_ids)
        here = self._port.guide_of(record.request)
        if frozen.guide not in ("", here):
            raise SessionError(f"{frozen.guide} guides the request at the source, {here} would here")

    def _adopt(self, record: Record, offer: KVOffer) -> None:
        incoming = _incoming(record)
        incoming.parts.refresh(self._port.tables(record.request))
        incoming.parts.adopt(incoming.offer, offer)
        incoming.offer = offer

    # Copies

    def _copy_tail(self, record: Record, may_wait: bool) -> None:
        incoming = _incoming(record)
        if incoming.commit is None:
            raise SessionError(f"request {record.request_id} has no commit")
        self._adopt(record, incoming.commit.offer)
        job = self._job(record, incoming.offer.num_tokens)
        size = len(job.src_blocks) * self.bytes_per_block
        late = size > self._wait_bytes or not self._late.isdisjoint(job.agents)
        if not may_wait or late or self._port.neighbours.may_read(job.dst_blocks):
            self._new.append(job)
            return
        mark("target-core", "copy", record.request_id)
        self._urgent.append(job)
        if not self._gathering:
            self._copy_urgent()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around commits that have come together: their tails are copied together at the end."""
        self._gathering = True
        try:
            yield
        finally:
            self._gathering = False
            if self._urgent:
                self._copy_urgent()

    def _copy_urgent(self) -> None:
        jobs, self._urgent = self._urgent, []
        size = sum(len(job.src_blocks) for job in jobs) * self.bytes_per_block
        for results in self._ranks().copy(jobs, self._budget(size)):
            for job, result in zip(jobs, results, strict=True):
                if result is None:
                    self._late.update(job.agents)
                else:
                    self._take(result)

    def _budget(self, size: int) -> float:
        return min(MAX_WAIT_S, max(_MIN_WAIT_S, 4 * size / self._bytes_per_s))

    def _job(self, record: Record, num_tokens: int, whole: bool = False) -> Job:
        incoming = _incoming(record)
        parts, frozen = incoming.parts, incoming.commit
        pairs = parts.take(incoming.offer, num_tokens, whole)
        proof = frozen if frozen is not None and frozen.checksums else None
        job = Job(
            job_id=next(self._job_ids),
            request_id=record.request_id,
            vllm_id=record.request.request_id,
            agents=incoming.offer.agents,
            src_blocks=pairs.src,
            dst_blocks=pairs.dst,
            checks=parts.checks(proof) if proof is not None else (),
            vouched=parts.vouched(proof) if proof is not None else (),
            deadline_s=max(0.0, min(self._deadline_s, incoming.use_until - time.monotonic())),
        )
        incoming.job = job
        incoming.rounds += 1
        self._flights[job.job_id] = _Flight(job, record)
        return job

    def take_new_jobs(self) -> tuple[list[Job], list[int]]:
        """Jobs for the workers to begin with this step, and earlier ones to cancel."""
        taken = self._new, self._cancelled
        self._new, self._cancelled = [], []
        return taken

    @property
    def busy(self) -> bool:
        """Does a worker still owe a result, or hold blocks?"""
        return bool(self._flights)

    def take_results(self, results: StepResults) -> None:
        """What the workers' jobs have come to since the last step."""
        for result in results.results:
            self._take(result)
        for job_id in results.quiet:
            self._quiet(self._flights[job_id])

    def _take(self, result: JobResult) -> None:
        flight = self._flights[result.job_id]
        flight.results.append(result)
        if len(flight.results) == self.num_ranks:
            incoming = flight.record.incoming
            if incoming is not None and incoming.job is flight.job:
                self._settle(flight, incoming)
                self._answer(flight.record, incoming)
        if result.quiet:
            self._quiet(flight)

    def _quiet(self, flight: _Flight) -> None:
        flight.quiet += 1
        if flight.quiet == self.num_ranks:
            del self._flights[flight.job.job_id]
            if flight.blocks:
                self._port.free_blocks_of(flight.blocks)

    def _settle(self, flight: _Flight, incoming: Incoming) -> None:
        results = flight.results
        incoming.job = None
        incoming.bytes += sum(r.bytes for r in results)
        incoming.descriptors += sum(r.descriptors for r in results)
        incoming.post_s += max(r.post_s for r in results)
        incoming.wire_s += max(r.wire_s for r in results)
        incoming.lane = results[0].lane or incoming.lane
        failed = next((r for r in results if not r.ok), None)
        if failed is None:
            incoming.parts.landed()
            self._late.difference_update(flight.job.agents)
            self._learn(results)
        else:
            bad = {block for r in results for block in r.bad_blocks}
            incoming.parts.failed(bad)
            incoming.error = failed.error
            if failed.error is not None:
                self.refused[failed.error[0]] += 1
            if not all(r.quiet for r in results):
                self._leave_blocks_to(flight, incoming)
                return
        if incoming.commit is None:
            return
        if incoming.offer is not incoming.commit.offer:
            # This was a round that the commit overtook: now the tail.
            self._copy_tail(flight.record, may_wait=False)
        elif failed is not None or not incoming.parts.reaches(incoming.offer, incoming.offer.num_tokens):
            self._start_over(flight.record)
        else:
            self._end(flight.record)
            self._port.finish_recv(flight.record.request, incoming.offer.num_tokens)

    def _learn(self, results: Iterable[JobResult]) -> None:
        for result in results:
            if result.bytes and result.wire_s:
                self._bytes_per_s += (result.bytes / result.wire_s - self._bytes_per_s) / 4

    # Ends

    def _end(self, record: Record) -> None:
        mark("target-core", "landed", record.request_id)
        incoming = _incoming(record)
        record.landed = self._progress(record, incoming)
        record.incoming = record.grammar = None
        self._answer(record, incoming)

    def _start_over(self, record: Record) -> None:
        """Compute everything behind the last good block."""
        incoming = _incoming(record)
        if flight := self._stop_job(incoming):
            self._leave_blocks_to(flight, incoming)
            return
        good = incoming.parts.good_tokens(incoming.offer)
        self._end(record)
        self._port.fail_recv(record.request, good)

    def _leave_blocks_to(self, flight: _Flight, incoming: Incoming) -> None:
        """Something may still land in the blocks of a job that has failed: the request gets others."""
        record = flight.record
        flight.blocks = self._port.unreserve(record.request)
        incoming.parts = self._parts()
        if incoming.commit is not None:
            self._end(record)
            self._port.to_front(record.request)

    def finished(self, record: Record) -> None:
        """The request is about to end, and vLLM will free the blocks that it still has."""
        incoming, record.incoming = record.incoming, None
        if incoming is None:
            return
        for waiter in incoming.waiters:
            waiter.set_exception(RequestNotFound(f"request {record.request_id} has just ended"))
        self._port.give_up_seat(record.request)
        if flight := self._stop_job(incoming):
            flight.blocks = self._port.take_blocks(record.request)

    def _stop_job(self, incoming: Incoming) -> _Flight | None:
        """Drop a job that workers have not been given. One that they have is cancelled, may still write for a while,
        and is returned.
        """
        job, incoming.job = incoming.job, None
        if job is None:
            return None
        if job not in self._new:
            self._cancelled.append(job.job_id)
            return self._flights[job.job_id]
        self._new.remove(job)
        del self._flights[job.job_id]
        return None

    def kept_blocks(self) -> Iterable[KVCacheBlock]:
        """Blocks that belong to jobs, not to requests."""
        return itertools.chain.from_iterable(flight.blocks for flight in self._flights.values())


def require_same(tokens: tuple[int, ...], frozen: Frozen) -> None:
    """The worker commits what the source's engine has committed, or gets ``SessionError``."""
    if tokens != frozen.output_token_ids:
        raise SessionError("the source's engine has committed other tokens than its worker")


def _incoming(record: Record) -> Incoming:
    if record.incoming is None:
        raise SessionError(f"request {record.request_id} is not landing")
    return record.incoming
