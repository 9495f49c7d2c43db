# SPDX-License-Identifier: Apache-2.0
"""Chooses the requests of a step, preempts, freezes and resumes.

A step is ``begin`` (admit, reserve blocks, preempt), the engine's pause, ``end`` (write KV, choose tokens). Calls in
between see a step in flight: ``freeze`` waits for its end; an aborted request is left out.
A frozen or landing request always keeps its blocks; only running ones are preempted.

Threading: one asyncio loop. Errors: ``SessionError`` for a call in the wrong phase of the request,
``NotMigratable``, ``RequestNotFound``.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from components.engine.kv import Frozen, KVOffer, RequestId
from components.engine.paged.blocks import BlockPool
from components.engine.paged.model import PagedKV
from components.engine.paged.request import Active
from components.engine.protocol import FinishReason, RequestPhase, TokenLogprob
from components.errors import NoRoom, NotMigratable, RequestNotFound, SessionError
from components.transfer.ids import AgentRef

WAITING = (RequestPhase.WAITING, RequestPhase.PREEMPTED)
_RUNNING = (RequestPhase.PREFILL, RequestPhase.DECODE)


class Scheduler:
    """Requests of one engine; see the module docstring."""

    def __init__(self, kv: PagedKV, pool: BlockPool, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.kv = kv
        self.pool = pool
        self.block_size = kv.block_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.requests: dict[RequestId, Active] = {}
        self.preemptions_total = 0
        self.scheduled_prefill_tokens = 0
        self.agents: tuple[AgentRef, ...] = ()
        self.checksums: Callable[[tuple[int, ...]], tuple[int, ...]] = lambda blocks: ()
        """Checksums of a frozen request's blocks, as far as they are checked."""
        self._batch: dict[Active, int] = {}

    # Requests come and go

    def get(self, request_id: RequestId) -> Active:
        """A request of this engine. Raises ``RequestNotFound``."""
        active = self.requests.get(request_id)
        if active is None:
            raise RequestNotFound(f"request {request_id} is not in this engine")
        return active

    def grow(self, active: Active, num_tokens: int) -> None:
        """Allocate blocks for the first ``num_tokens`` tokens. Raises ``NoRoom``, with nothing changed."""
        missing = -(-num_tokens // self.block_size) - len(active.blocks)
        if missing > 0:
            active.blocks = active.blocks + self.pool.allocate(missing)

    def end_request(self, active: Active, reason: FinishReason, error: tuple[str, str] | None = None) -> None:
        """Send the last output and free all blocks. Idempotent."""
        if not active.ended:
            active.finish(reason, error)
            self.remove(active)

    def remove(self, active: Active) -> None:
        """Drop a request and free its blocks. A copy in flight still holds those that it writes."""
        active.ended = True
        self.requests.pop(active.request_id, None)
        if active.landing is not None and active.landing.handle is not None:
            active.landing.handle.cancel()
        self._fail_waiters(active, RequestNotFound(f"request {active.request_id} has just finished"))
        self.pool.drop(active.blocks)
        active.blocks = []

    def seats(self) -> int:
        """Requests that need a seat: running, landing (they will run) and frozen (they may resume)."""
        return sum(a.phase in (*_RUNNING, RequestPhase.LANDING) or _keeps_seat(a) for a in self.requests.values())

    def run(self, active: Active) -> None:
        """Run a request with the KV that it has."""
        prefill = active.computed < len(active.tokens) - 1
        active.phase = RequestPhase.PREFILL if prefill else RequestPhase.DECODE

    # Steps

    def begin(self) -> bool:
        """Choose what the step computes. False when there is nothing to do."""
        self._admit()
        budget = self.max_num_batched_tokens
        self._batch = {}
        for active in sorted(self._in_phase(_RUNNING), key=_decode_first):
            count = min(len(active.tokens) - active.computed, budget)
            if count > 0 and active.phase in _RUNNING and self._make_room(active, count):
                self._batch[active] = count
                budget -= count
        self.scheduled_prefill_tokens = sum(n for a, n in self._batch.items() if a.phase is RequestPhase.PREFILL)
        return bool(self._batch)

    def _in_phase(self, phases: tuple[RequestPhase, ...]) -> list[Active]:
        return [a for a in self.requests.values() if a.phase in phases]

    def _admit(self) -> None:
        seats = self.seats()
        for active in sorted(self._in_phase(WAITING), key=_rank):
            # One block more than the tokens need, or the first decode step would preempt it again.
            needed = -(-len(active.tokens) // self.block_size)
            spare = 1 if self.seats() else 0
            if seats >= self.max_num_seqs or self.pool.free < needed + spare:
                return
            self.run(active)
            seats += 1

    def _make_room(self, active: Active, count: int) -> bool:
        while True:
            try:
                self.grow(active, active.computed + count)
                return True
            except NoRoom:
                victim = max(self._in_phase(_RUNNING), key=_rank)
                self._batch.pop(victim, None)
                self.preempt(victim)
                if victim is active:
                    return False

    def preempt(self, active: Active) -> None:
        """Preempt: free the blocks and wait; everything is recomputed later."""
        self.preemptions_total += 1
        active.preemptions += 1
        active.generation += 1
        active.phase = RequestPhase.PREEMPTED
        self.pool.drop(active.blocks)
        active.blocks, active.computed = [], 0

    def end(self) -> None:
        """Compute what ``begin`` chose, without requests that have ended since."""
        batch, self._batch = self._batch, {}
        for active, count in batch.items():
            if active.ended or active.phase not in _RUNNING:
                continue
            for position in range(active.computed, active.computed + count):
                self.kv.write(active.tokens[position], position, active.blocks)
            active.computed += count
            self.run(active)
            if active.computed == len(active.tokens):
                self._add_token(active)
            if active.waiters and not active.ended:
                self._freeze_now(active)

    def _add_token(self, active: Active) -> None:
        sampling = active.request.sampling
        token = self.kv.next_token(active.computed, active.blocks, active.salt, active.generator)
        active.tokens.append(token)
        if sampling.seed is not None and sampling.temperature:
            active.generator = active.generator + 1 & (1 << 64) - 1
        self.run(active)
        logprobs: tuple[TokenLogprob, ...] = ()
        if sampling.logprobs is not None:
            value = math.log((token + 1) / (1 << 32))
            logprobs = (TokenLogprob(value, 1, ((token, value),) * min(1, sampling.logprobs)),)
        reason = self._why_end(active, token)
        active.emit(token, logprobs, reason)
        if reason is not None:
            self.remove(active)

    def _why_end(self, active: Active, token: int) -> FinishReason | None:
        sampling = active.request.sampling
        if active.num_outputs >= sampling.min_tokens and token in sampling.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if active.num_outputs >= active.max_outputs else None

    # Freezing

    def offer(self, active: Active, whole_blocks: bool) -> KVOffer:
        """Blocks of a request that are readable now."""
        computed = active.computed if active.phase in (*_RUNNING, RequestPhase.FROZEN) else 0
        if whole_blocks:
            computed -= computed % self.block_size
        count = -(-computed // self.block_size)
        return KVOffer(
            request_id=active.request_id,
            agents=self.agents,
            block_size=self.block_size,
            block_ids=tuple(active.blocks[:count]),
            num_tokens=computed,
            generation=active.generation,
        )

    async def freeze(self, active: Active) -> Frozen:
        """Stop after the step in flight. Raises the errors of the module docstring."""
        if active.frozen is not None:
            return active.frozen
        why = active.request.sampling.why_not_migratable()
        if why is not None:
            raise NotMigratable(why)
        if active.landing is not None:
            raise SessionError(f"request {active.request_id} is itself still landing here")
        if active not in self._batch:
            return self._freeze_now(active)
        waiter: asyncio.Future[Frozen] = asyncio.get_running_loop().create_future()
        active.waiters.append(waiter)
        return await waiter

    def _freeze_now(self, active: Active) -> Frozen:
        active.phase = RequestPhase.FROZEN
        offer = self.offer(active, whole_blocks=False)
        seeded = active.request.sampling.seed is not None
        active.frozen = Frozen(
            offer=offer,
            output_token_ids=active.outputs,
            rng_state=active.generator.to_bytes(8, "little") if seeded else b"",
            checksums=self.checksums(offer.block_ids),
        )
        for waiter in active.waiters:
            if not waiter.done():
                waiter.set_result(active.frozen)
        active.waiters.clear()
        return active.frozen

    def resume(self, active: Active) -> None:
        """Resume after ``freeze``; no effect on a request that is not frozen."""
        self._fail_waiters(active, SessionError(f"request {active.request_id} was resumed meanwhile"))
        if active.frozen is None:
            return
        active.frozen = None
        if active.blocks:
            self.run(active)
        else:
            active.phase = RequestPhase.PREEMPTED if active.preemptions else RequestPhase.WAITING

    def _fail_waiters(self, active: Active, error: Exception) -> None:
        for waiter in active.waiters:
            if not waiter.done():
                waiter.set_exception(error)
        active.waiters.clear()


def _keeps_seat(active: Active) -> bool:
    return active.phase is RequestPhase.FROZEN and bool(active.blocks)


def _rank(active: Active) -> tuple[int, int]:
    return active.request.priority, active.arrival


def _decode_first(active: Active) -> tuple[bool, int, int]:
    return active.phase is RequestPhase.PREFILL, *_rank(active)
