# SPDX-License-Identifier: Apache-2.0
"""The source's half: offers of blocks, freezing, resuming.

Freezing takes a request out of vLLM's queues: it is not scheduled, keeps its blocks, its seat and the model runner's
state, as any running request that a step leaves out. A step in flight ends first, and its tokens leave through the
request's stream; the state is complete after it. Resuming puts the request back as if nothing had happened.

Threading: the engine core's thread. Errors: ``NotMigratable`` and ``SessionError``; a freeze call that waits for a
step gets ``RequestNotFound`` when the request finishes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import msgspec
from vllm.v1.request import Request, RequestStatus

from components.engine.groups import fields_of, tables_of
from components.engine.kv import CommitTo, Frozen, KVOffer, RequestId
from components.engine.vllm.compat.requests import why_not_migratable
from components.engine.vllm.compat.scheduler import SchedulerPort
from components.engine.vllm.control import Reply
from components.engine.vllm.direct import Outbox
from components.engine.vllm.ranks import Ranks, Snapshot
from components.engine.vllm.records import Leaving, Record
from components.errors import NotMigratable, RequestNotFound, SessionError
from components.timeline import mark
from components.transfer.ids import AgentRef

_FREEZABLE = (RequestStatus.RUNNING, RequestStatus.WAITING, RequestStatus.PREEMPTED)


class Checked(NamedTuple):
    """Blocks whose checksums prove what a request has."""

    blocks: tuple[int, ...]
    counts: tuple[int, ...]
    """How many of each group."""


class MigrateOut:
    """See the module docstring."""

    def __init__(self, port: SchedulerPort, checked_blocks: int | None, ranks: Callable[[], Ranks]) -> None:
        self._port = port
        self._checked_blocks = checked_blocks
        """How many blocks at the end get a checksum; None: all."""
        self._ranks = ranks
        self.outbox = Outbox()
        self.agents: tuple[AgentRef, ...] = ()
        self._freezing: list[Record] = []
        self.num_taken_out = 0
        """Requests that the scheduler knows but that are in none of its queues."""

    def offer(self, record: Record, whole_blocks: bool = True) -> KVOffer:
        """The computed blocks of a request; none while it is not running."""
        request = record.request
        size = self._port.block_size
        computed = 0 if record.incoming is not None else self._port.computed_tokens(request)
        if whole_blocks:
            computed -= computed % size
        return self.offer_of(record.request_id, request, computed, with_states=not whole_blocks)

    def offer_of(self, request_id: RequestId, request: Request, num_tokens: int, with_states: bool = True) -> KVOffer:
        """What a request has of the blocks that are needed behind its first ``num_tokens``."""
        tables = self._port.held(request, num_tokens)
        if not with_states:
            tables = [
                table._replace(first=table.past, ids=()) if group.state else table
                for group, table in zip(self._port.groups, tables, strict=True)
            ]
        return KVOffer(
            request_id=request_id,
            agents=self.agents,
            block_size=self._port.block_size,
            num_tokens=num_tokens,
            generation=request.num_preemptions,
            **fields_of(tables),
        )

    def why_not(self, record: Record) -> str | None:
        """Why a request cannot move, or None."""
        request = record.request
        return self._port.why_not(request) or why_not_migratable(request)

    def freeze(
        self, record: Record, commit_to: CommitTo | None = None, use_within_s: float = 0.0
    ) -> Reply | Future[Reply]:
        """Freeze a request; its state is in the reply and, before that, on its way to ``commit_to``. Idempotent."""
        leaving = record.leaving
        if leaving is not None and leaving.frozen is not None:
            return Reply(frozen=leaving.frozen)
        if reason := self.why_not(record):
            raise NotMigratable(reason)
        if record.incoming is not None:
            raise SessionError(f"request {record.request_id} is itself still landing here")
        if record.request.status not in _FREEZABLE:
            raise SessionError(f"request {record.request_id} cannot be frozen while {record.request.status}")
        leaving = leaving or self._take_out(record)
        leaving.commit_to, leaving.use_within_s = commit_to, use_within_s
        if commit_to is not None:
            self.outbox.open(commit_to)
        if not self._port.in_flight(record.request):
            self._complete([record])
            return Reply(frozen=leaving.frozen)
        waiter: Future[Reply] = Future()
        leaving.waiters.append(waiter)
        return waiter

    def _take_out(self, record: Record) -> Leaving:
        mark("source-core", "taken out", record.request_id)
        record.move = leaving = Leaving(self._port.take_out(record.request))
        self._freezing.append(record)
        self.num_taken_out += 1
        return leaving

    def checked(self, offer: KVOffer) -> Checked:
        """Those of an offer's blocks that get a checksum: the last ones of each group."""
        blocks: tuple[int, ...] = ()
        counts = []
        for group, table in zip(self._port.groups, tables_of(offer), strict=True):
            has = len(table.ids)
            wanted = has if self._checked_blocks is None else min(self._checked_blocks, has)
            if wanted and group.check_all:
                wanted = has
            blocks += table.ids[has - wanted :]
            counts.append(wanted)
        return Checked(blocks, tuple(counts))

    def _complete(self, records: Sequence[Record]) -> None:
        for record in records:
            mark("source-core", "last step ended", record.request_id)
        offers = [self.offer(record, whole_blocks=False) for record in records]
        checked = [self.checked(offer) for offer in offers]
        wanted = [(record.request.request_id, some.blocks) for record, some in zip(records, checked, strict=True)]
        states = zip(*self._ranks().snapshots(wanted), strict=True)
        for record, offer, some, ranks in zip(records, offers, checked, states, strict=True):
            if (leaving := record.leaving) is not None:
                self._give(record, leaving, offer, some, ranks)

    def _give(
        self, record: Record, leaving: Leaving, offer: KVOffer, checked: Checked, ranks: Sequence[Snapshot]
    ) -> None:
        leaving.frozen = Frozen(
            offer=offer,
            output_token_ids=tuple(record.request.output_token_ids),
            rng_state=record.rng_state if record.needs_install else ranks[0].rng_state,
            checksums=tuple(value for rank in ranks for value in rank.checksums),
            checked=checked.counts,
            guide=self._port.guide_of(record.request),
        )
        mark("source-core", "state made", record.request_id)
        if leaving.commit_to is not None:
            given = msgspec.structs.replace(leaving.frozen, use_within_s=leaving.use_within_s)
            self.outbox.send(leaving.commit_to, given)
            mark("source-core", "commit sent", record.request_id)
        self._freezing.remove(record)
        for waiter in leaving.waiters:
            waiter.set_result(Reply(frozen=leaving.frozen))
        leaving.waiters.clear()

    def resume(self, record: Record) -> None:
        """Go on here. Does nothing to a request that is not frozen."""
        leaving = record.leaving
        if leaving is None:
            return
        self._forget(record, leaving, SessionError(f"request {record.request_id} was resumed meanwhile"))
        self._port.put_back(record.request, leaving.was_running)

    def finished(self, record: Record) -> None:
        """The request has ended, in any phase."""
        if (leaving := record.leaving) is not None:
            self._forget(record, leaving, RequestNotFound(f"request {record.request_id} has just finished"))
            self._port.seats.give_up(record.request)

    def _forget(self, record: Record, leaving: Leaving, error: Exception) -> None:
        record.move = None
        self.num_taken_out -= 1
        if record in self._freezing:
            self._freezing.remove(record)
        for waiter in leaving.waiters:
            waiter.set_exception(error)

    def after_step(self) -> None:
        """Freeze what waited for the step that has just ended."""
        ended = [record for record in self._freezing if not self._port.in_flight(record.request)]
        if ended:
            self._complete(ended)
