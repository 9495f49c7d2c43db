# SPDX-License-Identifier: Apache-2.0
"""Disaggregated prefill: the blocks that a prefill engine lends, and their way into a decode engine.

Prefill
    A request with ``lend`` in its marker ends with its first token. This module then owns its blocks, under vLLM's id
    of the request, until ``release``, which the worker's process calls when the decode worker has them or the lease is
    over. Workers sum tail blocks at the end of the step that computes them, so that no call waits for a step.

Decode
    The hand-off uses vLLM's path for KV that is loaded beside its steps: vLLM asks for the number of such tokens,
    allocates, and holds the request; the copy is a landing that is committed from the start (``migrate_in``). Blocks
    that cannot be copied or verified are computed here.

Threading: the engine core's thread, inside vLLM's hooks or between two steps.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import RequestStatus

from components.engine.groups import why_unproven
from components.engine.kv import Frozen, KVOffer, RequestId
from components.engine.vllm.compat.scheduler import SchedulerPort
from components.engine.vllm.control import MARKER, Lent, encode
from components.engine.vllm.migrate_in import MigrateIn
from components.engine.vllm.migrate_out import MigrateOut
from components.engine.vllm.records import Record, StepResults, Sums, use_until

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

_COMPLETE = (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)
_NOTHING: dict[str, Any] = {"do_remote_prefill": False, "do_remote_decode": False}
"""vLLM's answer for: compute the prompt."""


class Handoff:
    """See the module docstring."""

    def __init__(self, port: SchedulerPort, incoming: MigrateIn, outgoing: MigrateOut) -> None:
        self._port = port
        self._incoming = incoming
        self._outgoing = outgoing
        self._lending: dict[str, Record] = {}
        self._sums: dict[str, list[Sums]] = {}
        self._lent: dict[str, Sequence[KVCacheBlock]] = {}

    def begin(self, record: Record) -> None:
        """vLLM has queued a request that will be lent, or that has its prompt at a prefill engine."""
        if record.marker.lend:
            self._lending[record.request.request_id] = record
        frozen = record.marker.handoff
        if frozen is not None and self._fits(record.request, frozen):
            record.handoff = frozen

    def _fits(self, request: Request, frozen: Frozen) -> bool:
        offer = frozen.offer
        return (
            self._incoming.why_unusable(offer) is None
            and why_unproven(frozen) is None
            and offer.num_tokens == request.num_prompt_tokens
            and self._port.not_movable is None
        )

    # Prefill

    def to_sum(self, step: SchedulerOutput) -> list[tuple[str, tuple[int, ...]]]:
        """Blocks for the workers to sum after this step, for each request with a prompt that it completes."""
        found = []
        for vllm_id, record in self._lending.items():
            count, request = step.num_scheduled_tokens.get(vllm_id, 0), record.request
            if count and request.num_computed_tokens + count >= request.num_prompt_tokens:
                blocks = self._outgoing.checked(self._offer(request)).blocks
                if blocks:
                    found.append((vllm_id, blocks))
        return found

    def _offer(self, request: Request) -> KVOffer:
        """The blocks of its prompt."""
        return self._outgoing.offer_of(RequestId(request.request_id), request, request.num_prompt_tokens)

    def summed(self, results: StepResults | None) -> None:
        """Take the workers' sums, before vLLM processes the tokens of the step."""
        for sums in results.sums if results is not None else ():
            self._sums.setdefault(sums.vllm_id, []).append(sums)

    def lend(self, record: Record) -> dict[str, Any] | None:
        """The request has ended: keep its blocks and describe them. None for a request that is not lent."""
        request = record.request
        vllm_id = request.request_id
        if self._lending.pop(vllm_id, None) is None:
            return None
        ranks = sorted(self._sums.pop(vllm_id, ()), key=lambda each: each.rank)
        offer, first = self._offer(request), tuple(request.output_token_ids)
        checked = self._outgoing.checked(offer)
        proven = len(ranks) == len(self._outgoing.agents) or not checked.blocks
        params = request.sampling_params
        if params is None or request.status not in _COMPLETE or self._port.not_movable or not (first and proven):
            return dict(_NOTHING)
        sums = tuple(value for rank in ranks for value in rank.begun())
        frozen = Frozen(offer, first, checksums=sums, checked=checked.counts)
        self._lent[vllm_id] = self._port.take_blocks(request)
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            MARKER: encode(Lent(frozen, stops=first[0] in params.all_stop_token_ids)),
        }

    def release(self, vllm_id: str, expired: bool = False) -> bool:
        """Free lent blocks; ``expired``: no decode worker has asked for them. False: they are not lent."""
        blocks = self._lent.pop(vllm_id, None)
        if blocks is None:
            return False
        if expired:
            self._incoming.copies.prompts.expired()
        self._port.free_blocks_of(blocks)
        return True

    def lent_blocks(self) -> Iterable[KVCacheBlock]:
        """All lent blocks, which belong to no request of this engine."""
        return itertools.chain.from_iterable(self._lent.values())

    # Decode

    def external_tokens(self, record: Record, num_computed_tokens: int) -> tuple[int, bool]:
        """Number of tokens of a queued request that come from the prefill engine, beside the steps."""
        if record.handoff is not None and time.monotonic() > use_until(record.handoff, record.born):
            # After so long in the queue the prefill engine may have freed the blocks.
            record.handoff = None
        if record.handoff is None:
            return 0, False
        count = record.handoff.offer.num_tokens - num_computed_tokens
        return max(0, count), count > 0

    def allocated(self, record: Record, tables: Sequence[list[int]], num_external_tokens: int) -> None:
        """vLLM has allocated the request's blocks: begin to copy, or drop the offer."""
        frozen, record.handoff = record.handoff, None
        if frozen is not None and num_external_tokens > 0:
            self._port.neighbours.given(block for ids in tables for block in ids)
            self._incoming.begin_whole(record, frozen, tables, frozen.offer.num_tokens - num_external_tokens)
