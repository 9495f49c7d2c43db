# SPDX-License-Identifier: Apache-2.0
"""Disaggregated prefill in Dynamo's way: ``kv_transfer_params`` in, ``kv_transfer_params`` out.

Prefill worker
    ``do_remote_decode``: the request ends with its first token and its blocks are lent. Dynamo passes their
    description and the token to a decode worker. The blocks are freed when the decode worker releases them (a call of
    this worker's ``migrate`` endpoint), or after ``lease_s``.

Decode worker
    ``do_remote_prefill``: the engine copies the blocks beside its steps and computes missing ones. The prefill
    worker's first token is given out at once where the decode worker would compute the same (``why_not_first``);
    otherwise the decode worker computes it, as in stock Dynamo. Blocks are released with the first output of the
    engine, or with the end of the stream. An unusable hand-off is counted and computed here, never an error.

Threading: the worker's asyncio loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from vllm import SamplingParams
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import SamplingType

from components.engine.kv import RequestId
from components.engine.protocol import FinishReason, GenerateOutput
from components.engine.vllm import native
from components.engine.vllm.control import MARKER, Marker, decode_lent, encode
from components.engine.vllm.sampling import logprobs_of
from components.errors import MigrateError
from components.messages import pack, unpack
from components.migration.messages import Handover, Owner, WorkerCall, WorkerOp
from components.migration.requests import Requests

logger = logging.getLogger(__name__)
_DECODE, _PREFILL = "do_remote_decode", "do_remote_prefill"
_CACHED = "remote_prefill_cached_tokens"


def is_prefill(params: SamplingParams) -> bool:
    """True for a call of Dynamo's prefill handler."""
    return bool(native.transfer_of(params).get(_DECODE))


@dataclass(frozen=True)
class Entry:
    """A request for the decode worker's engine."""

    prompt: Any
    params: SamplingParams
    handover: Handover | None = None
    """Blocks to release."""
    first: GenerateOutput | None = None
    """Output before the engine's; the only one if it has a finish reason."""


class Handoffs:
    """See the module docstring."""

    def __init__(
        self,
        requests: Requests,
        free: Callable[[RequestId, bool], Awaitable[None]],
        lease_s: float,
        max_model_len: int,
    ) -> None:
        self._requests = requests
        self._free = free
        self._lease_s = lease_s
        self._max_model_len = max_model_len
        self._lent: dict[RequestId, asyncio.TimerHandle] = {}

    # Prefill worker

    def lending(self, params: SamplingParams, request_id: RequestId) -> SamplingParams:
        """Dynamo's parameters, limited to one sample and its first token."""
        params = native.with_transfer(params, {MARKER: encode(Marker(request_id, lend=True))})
        # Dynamo sets ``min_tokens`` to 1 whatever the client's value. ``why_not_first`` decides later.
        params.min_tokens = 0
        params.n = 1
        return params

    def lent(self, item: RequestOutput, adapter: str = "") -> None:
        """Complete the engine's description of an ended request, which Dynamo passes to a decode worker.

        ``adapter`` is the digest of its LoRA adapter.
        """
        given = item.kv_transfer_params or {}
        if MARKER not in given:
            return
        lent, sample = decode_lent(given[MARKER]), item.outputs[0]
        handover = Handover(
            fingerprint=self._requests.arrivals.fingerprint,
            adapter=adapter,
            instance=self._requests.instance,
            frozen=msgspec.structs.replace(lent.frozen, use_within_s=self._lease_s / 2),
            stops=lent.stops,
            captured=sample.routed_experts is not None or sample.sampling_mask is not None,
            logprobs=logprobs_of(sample.logprobs, tuple(sample.token_ids)),
        )
        item.kv_transfer_params = {**given, MARKER: pack(handover)}
        handoff_id = lent.frozen.offer.request_id
        loop = asyncio.get_running_loop()
        self._lent[handoff_id] = loop.call_later(self._lease_s, self._lease_over, handoff_id)
        self._requests.handoffs["lent"] += 1

    def _lease_over(self, handoff_id: RequestId) -> None:
        logger.warning("blocks of %s are freed: no decode worker has asked within %g s", handoff_id, self._lease_s)
        self._requests.handoffs["lease_over"] += 1
        self._requests.spawn(self.release(handoff_id, expired=True))

    async def release(self, handoff_id: RequestId, expired: bool = False) -> None:
        """Free lent blocks. Idempotent."""
        timer = self._lent.pop(handoff_id, None)
        if timer is not None:
            timer.cancel()
            await self._free(handoff_id, expired)

    @property
    def num_lent(self) -> int:
        """Requests with blocks that a decode worker may still read."""
        return len(self._lent)

    def known(self, request_id: RequestId, tokens: list[int], owner: Owner) -> RequestOutput:
        """The answer for a repeat of a request that runs at a decode worker."""
        self._requests.handoffs["owned"] += 1
        sample = CompletionOutput(0, "", tokens[-1:], None, None, finish_reason="length")
        output = RequestOutput(request_id, None, tokens, None, [sample], finished=True)
        output.kv_transfer_params = {_PREFILL: False, _DECODE: False, MARKER: pack(Handover(owner=owner))}
        return output

    # Decode worker

    def read(self, params: SamplingParams) -> Handover | None:
        """A prefill worker's ticket of this request; None without one or when it is unreadable."""
        given = native.transfer_of(params).get(MARKER)
        try:
            return None if given is None else unpack(given, Handover)
        except MigrateError as error:
            logger.warning("a hand-over is not used: %s", error)
            self._requests.handoffs[f"local_{error.code}"] += 1
            return None

    def enter(
        self,
        request_id: RequestId,
        prompt: Any,
        params: SamplingParams,
        tokens: list[int] | None,
        given: Handover | None,
        adapter: str | None = "",
    ) -> Entry:
        """The request for the engine. ``adapter``: digest of its LoRA adapter; empty: none; None: unknown."""
        plain = native.with_transfer(params, {})
        if given is None or given.frozen is None:
            if MARKER not in native.transfer_of(params):
                self._requests.handoffs["local_not_lent"] += 1
            return Entry(prompt, plain)
        same = given.fingerprint == self._requests.arrivals.fingerprint
        if not same or given.adapter != adapter:
            self._requests.handoffs["local_adapter" if same else "local_fingerprint"] += 1
            self.give_back(given)
            return Entry(prompt, plain)
        why = why_not_first(params, tokens, given)
        self._requests.handoffs[f"first_token_{why or 'used'}"] += 1
        if why or tokens is None:
            return Entry(prompt, self._marked(params, Marker(request_id, handoff=given.frozen)), given)
        made = given.frozen.output_token_ids
        first = GenerateOutput(0, made, given.logprobs)
        if params.max_tokens == 1 or len(tokens) + 1 >= self._max_model_len:
            last = GenerateOutput(0, made, given.logprobs, finish_reason=FinishReason.LENGTH)
            return Entry(prompt, plain, given, last)
        marker = Marker(request_id, num_prompt_tokens=len(tokens), handoff=given.frozen)
        return Entry({**prompt, "prompt_token_ids": [*tokens, *made]}, self._marked(params, marker), given, first)

    def _marked(self, params: SamplingParams, marker: Marker) -> SamplingParams:
        transfer = native.transfer_of(params)
        told = {key: transfer[key] for key in (_PREFILL, _CACHED) if key in transfer}
        return native.with_transfer(params, {**told, MARKER: encode(marker)})

    def give_back(self, given: Handover) -> None:
        """Release the prefill worker's blocks; when the call fails, its lease frees them."""
        if given.frozen is not None:
            call = WorkerCall(WorkerOp.RELEASE, given.frozen.offer.request_id)
            self._requests.spawn(self._requests.peers.call(given.instance, call))

    async def stream(
        self, entry: Entry, own: AsyncGenerator[RequestOutput, None], face: native.OutputFace, tokens: list[int] | None
    ) -> AsyncGenerator[RequestOutput, None]:
        """The engine's stream after the first token, with the client's prompt in its items."""
        given, unseen = entry.handover, set(range(entry.params.n))
        try:
            if entry.first is not None:
                made = face.make(entry.first)
                yield made
                if made.finished:
                    return
                # Dynamo's thread needs the GIL to send it, which the engine's call below holds for milliseconds.
                await asyncio.sleep(0)
            async for item in own:
                if entry.first is not None:
                    item.prompt_token_ids = tokens
                if given is not None:
                    unseen -= {sample.index for sample in item.outputs}
                    if not unseen:
                        self.give_back(given)
                        given = None
                yield item
        finally:
            await own.aclose()
            if given is not None:
                self.give_back(given)


def why_not_first(params: SamplingParams, tokens: list[int] | None, given: Handover) -> str:
    """Why the first token must be computed again; empty: the result would be equal.

    The prefill worker samples with the client's parameters except ``min_tokens``, which it does not know.
    """
    if tokens is None:
        return "multimodal"
    if params.n > 1:
        return "samples"
    if params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None:
        return "prompt_logprobs"
    if params.logprob_token_ids is not None or params.flat_logprobs:
        # Ranks of named tokens do not travel (``native.FIXED``).
        return "log_probabilities"
    if params.trace_decode_token_ids is not None:
        return "trace"
    if params.structured_outputs is not None:
        return "guided"
    if given.stops:
        return "stop"
    if given.captured:
        return "captured"
    # A greedy token that is no stop token is equal with and without them.
    if params.min_tokens and params.sampling_type is not SamplingType.GREEDY:
        return "min_tokens"
    return ""
