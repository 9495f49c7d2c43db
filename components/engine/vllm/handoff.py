# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode apart: blocks that a prefill engine lends, and how a decode engine takes them.

Prefill
    A request whose marker says ``lend`` ends with its first token. Its blocks then belong to nobody but this module,
    under vLLM's id of the request, until ``release``; the worker's process calls that when the decode worker has them,
    or when the lease is over. Tail blocks are summed on the workers at the end of the step that computes them, so that
    no call has to wait for a step.

Decode
    vLLM's own path for KV that is loaded beside its steps: vLLM asks how many tokens come from elsewhere, allocates,
    and holds the request; the copy is then a landing whose commit is there from the beginning (``migrate_in``). What
    cannot be copied or proven is computed here.

Threading: the engine core's thread, inside vLLM's hooks or between two steps.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import RequestStatus

from components.engine.protocol import Frozen, KVOffer, RequestId
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
"""vLLM's words for: compute the prompt yourself."""


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
        """vLLM has put a request in line that is to be lent, or whose prompt is elsewhere."""
        if record.marker.lend:
            self._lending[record.request.request_id] = record
        frozen = record.marker.handoff
        if frozen is not None and self._fits(record.request, frozen.offer):
            record.handoff = frozen

    def _fits(self, request: Request, offer: KVOffer) -> bool:
        return (
            self._incoming.why_unusable(offer) is None
            and offer.num_tokens == request.num_prompt_tokens
            and self._port.movable_layout() is None
        )

    # Prefill

    def to_sum(self, step: SchedulerOutput) -> list[tuple[str, tuple[int, ...]]]:
        """Blocks that the workers shall sum after this step, for each request whose prompt it completes."""
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

    def summed(self, results: object) -> None:
        """The workers have summed them; this comes before vLLM looks at the tokens of the step."""
        if isinstance(results, StepResults):
            for sums in results.sums:
                self._sums.setdefault(sums.vllm_id, []).append(sums)

    def lend(self, record: Record) -> dict[str, Any] | None:
        """The request has ended: keep its blocks, and say where they are. None for one that is not to be lent."""
        request = record.request
        vllm_id = request.request_id
        if self._lending.pop(vllm_id, None) is None:
            return None
        ranks = sorted(self._sums.pop(vllm_id, ()), key=lambda each: each.rank)
        offer, first = self._offer(request), tuple(request.output_token_ids)
        checked = self._outgoing.checked(offer)
        proven = len(ranks) == len(self._outgoing.agents) or not checked.blocks
        params = request.sampling_params
        if params is None or request.status not in _COMPLETE or self._port.movable_layout() or not (first and proven):
            return dict(_NOTHING)
        sums = tuple(value for rank in ranks for value in rank.begun())
        frozen = Frozen(offer, first, checksums=sums, checked=checked.counts)
        self._lent[vllm_id] = self._port.take_blocks(request)
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            MARKER: encode(Lent(frozen, stops=first[0] in params.all_stop_token_ids)),
        }

    def release(self, vllm_id: str) -> bool:
        """Nobody reads these blocks any more. False: they were not lent, or are not any more."""
        blocks = self._lent.pop(vllm_id, None)
        if blocks is None:
            return False
        self._port.free_blocks_of(blocks)
        return True

    def lent_blocks(self) -> Iterable[KVCacheBlock]:
        """Blocks that belong to no request of this engine."""
        return itertools.chain.from_iterable(self._lent.values())

    # Decode

    def external_tokens(self, record: Record, num_computed_tokens: int) -> tuple[int, bool]:
        """How many tokens of a request in line come from the prefill engine, beside the steps."""
        if record.handoff is not None and time.monotonic() > use_until(record.handoff, record.born):
            # It has waited in line for so long that the prefill engine may have given the blocks away.
            record.handoff = None
        if record.handoff is None:
            return 0, False
        count = record.handoff.offer.num_tokens - num_computed_tokens
        return max(0, count), count > 0

    def allocated(self, record: Record, tables: Sequence[list[int]], num_external_tokens: int) -> None:
        """vLLM has given the request its blocks: begin to copy, or forget that there was anything to copy."""
        frozen, record.handoff = record.handoff, None
        if frozen is not None and num_external_tokens > 0:
            self._incoming.begin_whole(record, frozen, tables, frozen.offer.num_tokens - num_external_tokens)
