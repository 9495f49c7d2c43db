# SPDX-License-Identifier: Apache-2.0
"""Takes requests out of vLLM's scheduler, and enters them, with their blocks.

Threading: the engine core's thread, between two steps or in one of vLLM's own hooks. No method waits.

States of vLLM that this port uses
    RUNNING                  in ``running``; a request that is taken out keeps status, blocks and runner state
    WAITING_FOR_REMOTE_KVS   has blocks that are being filled; vLLM continues with it when its id is in
                             ``finished_recving_kv_req_ids``, and recomputes everything behind its computed tokens
                             if the id is also in ``failed_recving_kv_req_ids``
    PREEMPTED                has output tokens; the model runner gets all of its tokens when it runs again
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from components.engine.groups import Table
from components.engine.vllm.compat.connectors import Neighbours
from components.engine.vllm.compat.grammars import Replay, guide_of
from components.engine.vllm.compat.groups import groups_of, leading_nulls, why_not_movable
from components.engine.vllm.compat.seats import Seats


@dataclass(frozen=True)
class Reservation:
    """Blocks of a request with KV from another engine; none if the prefix cache has all of it."""

    tables: list[list[int]]
    """Block numbers by position, for each group."""
    cached_tokens: int
    """Tokens at the front from the prefix cache; whole blocks."""


class SchedulerPort:
    """See the module docstring."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.seats = Seats(scheduler)
        self.groups = groups_of(scheduler.kv_cache_manager)
        """Groups of layers, each with its own blocks."""
        self.neighbours = Neighbours(scheduler.connector)
        """Other connectors that read blocks."""
        self.config = scheduler.vllm_config
        self.vocab_size = int(self.config.model_config.get_vocab_size())
        """Number of the model's tokens."""
        self.not_movable = why_not_movable(scheduler.kv_cache_manager)
        """Why no request of this engine can move, or None."""
        self._needed: int | None = None
        """Blocks that requests under prefill or being loaded still need, as counted since the last step."""

    def step(self) -> None:
        """Note that another step is scheduled."""
        self.neighbours.step()
        self._needed = None

    # What there is

    @property
    def block_size(self) -> int:
        """Tokens per KV block; for several groups, a number of tokens that is whole blocks in each."""
        return self._scheduler.block_size

    @property
    def max_tokens(self) -> int:
        """Prompt and answer of one request."""
        return self._scheduler.max_model_len

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool, including vLLM's null block."""
        return self._scheduler.kv_cache_config.num_blocks

    @property
    def free_blocks(self) -> int:
        """Blocks without holder."""
        return self._scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    @property
    def running(self) -> Sequence[Request]:
        """Requests in vLLM's ``running``."""
        return self._scheduler.running

    def request(self, vllm_id: str) -> Request | None:
        """The request with that internal id, until its blocks are freed."""
        return self._scheduler.requests.get(vllm_id)

    def why_not(self, request: Request) -> str | None:
        """Why this engine cannot move a request, or None.

        Drafts are dropped: the destination's drafter makes new ones, from the tokens and from its KV, which moves with
        the request's. The tokens of a seed depend on the begin and end of drafts, which a move changes.
        """
        params = request.sampling_params
        if self.not_movable is not None:
            return self.not_movable
        if self._scheduler.num_spec_tokens and params is not None and params.seed is not None and params.temperature:
            return "speculative decoding with a seed: what it gives depends on where drafts begin"
        return None

    def tables(self, request: Request) -> list[list[int]]:
        """Numbers of its KV blocks by position, for each group; 0 for freed ones."""
        return list(self._scheduler.kv_cache_manager.get_block_ids(request.request_id))

    def _numbers(self, request: Request) -> set[int]:
        return {block for ids in self.tables(request) for block in ids}

    def held(self, request: Request, num_tokens: int) -> list[Table]:
        """Its blocks, in each group, that are needed behind its first ``num_tokens``."""
        return [group.held(request.request_id, num_tokens) for group in self.groups]

    def num_blocks_of(self, request: Request) -> int:
        """Number of its KV blocks."""
        return sum(len(ids) - leading_nulls(ids) for ids in self.tables(request))

    def in_flight(self, request: Request) -> bool:
        """True while a step with this request has unprocessed tokens."""
        return request.num_in_flight_tokens > 0

    def computed_tokens(self, request: Request) -> int:
        """Tokens with KV that is certainly in its blocks."""
        if request.status != RequestStatus.RUNNING:
            return 0
        return request.num_computed_tokens - request.num_in_flight_tokens

    # Grammars

    def replay_grammar(self, request: Request) -> Replay:
        """Advance a guided request's grammar to the end of its output tokens."""
        return Replay(self._scheduler.structured_output_manager, request)

    def guide_of(self, request: Request) -> str:
        """What guides a request; empty: nothing."""
        return guide_of(self._scheduler.structured_output_manager, request)

    def fail_grammar(self, request: Request) -> None:
        """End a request without a usable grammar, as vLLM does."""
        self._scheduler.grammar_compile_error_reqs.add(request.request_id)

    # Source

    def take_out(self, request: Request) -> bool:
        """Stop scheduling it; blocks and the model runner's state stay. True if it was running."""
        if request.status == RequestStatus.RUNNING:
            self._scheduler.running.remove(request)
            self.seats.hold(request)
            return True
        self._leave_queues(request)
        return False

    def put_back(self, request: Request, was_running: bool) -> None:
        """Schedule it again after ``take_out``."""
        if was_running:
            self.seats.give_up(request)
            self._scheduler.running.append(request)
            return
        scheduler = self._scheduler
        queue = scheduler.kv_holding_waiting if scheduler._holds_kv_blocks(request) else scheduler.waiting
        queue.prepend_request(request)
        if scheduler._is_blocked_waiting_status(request.status):
            scheduler.deferred_waiting.add(request)

    def _leave_queues(self, request: Request) -> None:
        self._scheduler.waiting.remove_requests([request])
        self._scheduler.kv_holding_waiting.remove_requests([request])
        self._scheduler.deferred_waiting.discard(request)

    # Destination

    def reserve(self, request: Request, num_tokens: int, room_tokens: int = 0) -> Reservation | None:
        """Give a waiting request a seat, and blocks for ``room_tokens`` in all; its first ``num_tokens`` are loaded
        beside the steps, like vLLM's remote KV. None without room; nothing has changed then.
        """
        scheduler, manager = self._scheduler, self._scheduler.kv_cache_manager
        hit, local, _ = manager.get_computed_blocks(request)
        if rest := local % scheduler.block_size:
            local -= rest
            hit = manager.truncate_computed_blocks(hit, local)
        if not self.seats.hold(request):
            return None
        room = max(num_tokens, min(room_tokens, scheduler.max_model_len))
        if room <= local:
            return Reservation([], local)
        num_tokens = max(num_tokens, local)
        # For a state vLLM counts one block in a call: that of the load, or that of the tokens behind it.
        apart = num_tokens > local and any(group.state for group in self.groups)

        def allocate() -> KVCacheBlocks | None:
            return manager.allocate_slots(
                request,
                0 if apart else room - num_tokens,
                num_new_computed_tokens=local,
                new_computed_blocks=hit,
                num_external_computed_tokens=num_tokens - local,
                delay_cache_blocks=True,
                full_sequence_must_fit=scheduler.scheduler_reserve_full_isl,
                reserved_blocks=self._others_need(),
                has_scheduled_reqs=bool(scheduler.running),
            )

        given = allocate()
        if given is None and self._needed:
            # Requests that have ended since the count need nothing any more.
            self._needed = None
            given = allocate()
        if given is None:
            self.seats.give_up(request)
            return None
        self._leave_queues(request)
        request.status = RequestStatus.WAITING_FOR_REMOTE_KVS
        request.num_computed_tokens = num_tokens
        scheduler._inflight_prefills.add(request)
        scheduler._enqueue_waiting_request(request)
        placed = self._place_states(request)
        self._do_not_zero(request)
        if not placed or apart and not self.grow(request, num_tokens, room):
            self.free_blocks_of(self.unreserve(request))
            return None
        self._needed = self._others_need() + scheduler._request_remaining_blocks(request)
        if self.neighbours:
            self.neighbours.given(self._numbers(request))
        return Reservation(self.tables(request), local)

    def _others_need(self) -> int:
        """Counted once between two steps: vLLM asks each request, and a crowd asks for each of its own."""
        if self._needed is None:
            self._needed = self._scheduler._inflight_prefill_reserved_blocks()
        return self._needed

    def unreserve(self, request: Request) -> list[KVCacheBlock]:
        """Undo ``reserve``: the request waits again, without blocks. The caller owns them now."""
        blocks = self.take_blocks(request)
        self._leave_queues(request)
        request.status = RequestStatus.PREEMPTED if request.num_preemptions else RequestStatus.WAITING
        request.num_computed_tokens = 0
        self._scheduler._inflight_prefills.discard(request)
        self._scheduler._enqueue_waiting_request(request)
        self.seats.give_up(request)
        return blocks

    def is_reserved(self, request: Request) -> bool:
        """True while its blocks are being filled."""
        return request.status == RequestStatus.WAITING_FOR_REMOTE_KVS

    def grow(self, request: Request, num_tokens: int, room_tokens: int = 0) -> bool:
        """Extend a reserved request to ``num_tokens`` or ``room_tokens``, whichever is more. False without room."""
        had = request.num_computed_tokens
        # Blocks that the newest offer does not need are freed: no job writes to them (``Parts.take``).
        self._computed(request, had)
        new = max(num_tokens, min(room_tokens, self._scheduler.max_model_len)) - had
        if new <= 0:
            return True
        before = self._numbers(request) if self.neighbours else set()
        if self._scheduler.kv_cache_manager.allocate_slots(request, new, delay_cache_blocks=True) is None:
            return False
        request.num_computed_tokens = max(had, num_tokens)
        placed = self._place_states(request)
        self._do_not_zero(request)
        if self.neighbours:
            self.neighbours.given(self._numbers(request) - before)
        return placed

    def _place_states(self, request: Request) -> bool:
        """Put states at their place after the computed tokens; they need no room for further tokens."""
        states = [group for group in self.groups if group.state]
        return all(group.place_state(request.request_id, request.num_computed_tokens) for group in states)

    def _do_not_zero(self, request: Request) -> None:
        """Take back vLLM's order to zero new blocks of some caches: the next step may come after the copy."""
        if not self._scheduler.needs_kv_cache_zeroing:
            return
        given = self._numbers(request)
        for manager in self._scheduler.kv_cache_manager.coordinator.single_type_managers:
            manager.new_block_ids = [block for block in manager.new_block_ids if block not in given]

    def finish_recv(self, request: Request, num_tokens: int) -> None:
        """Its first ``num_tokens`` are in place; the next step runs it."""
        self._computed(request, num_tokens)
        if self._scheduler.needs_kv_cache_zeroing:
            for manager in self._scheduler.kv_cache_manager.coordinator.single_type_managers:
                if manager.records_new_block_ids:
                    behind = manager.req_to_blocks[request.request_id][-(-num_tokens // manager.block_size) :]
                    manager.new_block_ids.extend(block.block_id for block in behind)
        self._scheduler.finished_recving_kv_req_ids.add(request.request_id)
        self.seats.give_up(request)

    def fail_recv(self, request: Request, num_tokens: int) -> None:
        """Only its first ``num_tokens`` (whole blocks) are in place; the next step computes the rest."""
        self._computed(request, num_tokens)
        if self.is_reserved(request):
            self._scheduler.failed_recving_kv_req_ids.add(request.request_id)
            self._scheduler.finished_recving_kv_req_ids.add(request.request_id)
        self.seats.give_up(request)

    def _computed(self, request: Request, num_tokens: int) -> None:
        """Keep blocks that a window has left out of the prefix cache: they may never have been copied."""
        request.num_computed_tokens = num_tokens
        self._scheduler.kv_cache_manager.remove_skipped_blocks(
            request.request_id, num_tokens, request.num_prompt_tokens
        )

    def to_front(self, request: Request) -> None:
        """Admit a waiting request without blocks next, to its reserved seat."""
        self._scheduler.waiting.remove_requests([request])
        self._scheduler.waiting.prepend_request(request)
        self.seats.give_up(request)

    # Ends

    def let_finish(self, request: Request) -> None:
        """Before a reserved request ends: keep vLLM from waiting for its load."""
        if self.is_reserved(request):
            self._scheduler.finished_recving_kv_req_ids.add(request.request_id)

    def take_blocks(self, request: Request) -> list[KVCacheBlock]:
        """Take its blocks; the caller has to free them."""
        return self._scheduler.kv_cache_manager.pop_blocks_for_free(request)

    def free_blocks_of(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Return blocks of ``take_blocks`` to the pool."""
        # Reversed, as in vLLM: the prefix cache drops a request's end first.
        self._scheduler.kv_cache_manager.block_pool.free_blocks(list(reversed(blocks)))

    def is_idle_but_for(self, taken_out: int) -> bool:
        """True if the scheduler has only ``taken_out`` requests, outside its queues."""
        running, waiting = self._scheduler.get_request_counts()
        return not self._scheduler.finished_req_ids and len(self._scheduler.requests) <= running + waiting + taken_out

    def holders(self) -> Iterable[KVCacheBlock]:
        """Each block once for each of its requests, and blocks that are freed after a step in flight."""
        scheduler = self._scheduler
        for request in scheduler.requests.values():
            for blocks in scheduler.kv_cache_manager.get_blocks(request.request_id).blocks:
                yield from blocks
        for _, blocks in scheduler.deferred_frees:
            yield from blocks

    def pool(self) -> Iterable[KVCacheBlock]:
        """All blocks except the null block."""
        pool = self._scheduler.kv_cache_manager.block_pool
        return (block for block in pool.blocks if block is not pool.null_block)
