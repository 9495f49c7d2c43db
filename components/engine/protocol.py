# SPDX-License-Identifier: Apache-2.0
"""The interface of an inference engine: generate, freeze, land, release.

One request, one owner
    An engine either *runs* a request (tokens come out of its ``generate`` stream), holds it *frozen*
    (no token can come, its KV blocks stay allocated and unchanged) or holds it *landing* (KV blocks
    are reserved and being filled from another engine, no token can come yet). Moving a request is:

        destination                                source
        generate(request, landing=offer) ------->
            blocks reserved, bytes copied          (keeps decoding)
        extend(id, newer offer) ... bounded rounds
                                                   freeze(id) -> Frozen     no more tokens
        commit(id, frozen) -> tail copied, runs
            first token leaves ------------------> release(id)              blocks freed

    Any failure before the destination's first token: ``abort`` there, ``resume`` here.

Threading
    All methods are called from one asyncio loop. None may block it.

Errors
    ``components.errors``: ``RequestNotFound``, ``NoRoom``, ``NotMigratable``, ``SessionError``,
    ``TransferError`` and subclasses, ``InvalidRequest``. The caller owns every deadline.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from enum import StrEnum
from typing import Protocol

import msgspec

from components.engine.kv import CommitTo, Frozen, KVOffer, LandingStatus, RequestId
from components.transfer.ids import AgentRef


class FinishReason(StrEnum):
    """Reason for the end of a stream. ``FROZEN`` does not end the request: another engine continues."""

    STOP = "stop"
    LENGTH = "length"
    REPETITION = "repetition"
    CANCELLED = "cancelled"
    ERROR = "error"
    FROZEN = "frozen"


class RequestPhase(StrEnum):
    """Phase of a request inside an engine."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    PREEMPTED = "preempted"
    FROZEN = "frozen"
    LANDING = "landing"


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What determines the next token of an engine without a model. Names and meaning as in vLLM."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1

    def why_not_migratable(self) -> str | None:
        """Why this request cannot move exactly, or None."""
        if self.n > 1:
            return "n > 1: the samples share one request"
        if self.prompt_logprobs is not None:
            return "prompt_logprobs: they are produced once, during prefill"
        return None


class GenerateRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """A request as it enters an engine, new or moved.

    ``output_token_ids``: tokens that another worker has generated and delivered; the engine continues after
    them. Without ``landing`` it recomputes their KV (token replay).
    """

    request_id: RequestId
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling = Sampling()
    output_token_ids: tuple[int, ...] = ()
    priority: int = 0
    landing: KVOffer | None = None
    """Reserve and copy these blocks first; wait for ``commit``."""
    native: bytes = b""
    """Parameters in the engine's own form, which vLLM's needs; all others than tokens are then unused."""


class TokenLogprob(msgspec.Struct, frozen=True, omit_defaults=True):
    """Log-probability of one sampled token and of the best alternatives."""

    logprob: float
    rank: int = 0
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability), best first."""


class GenerateOutput(msgspec.Struct, frozen=True, omit_defaults=True):
    """New tokens. ``index`` is the position of the first one in the whole output."""

    index: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: tuple[str, str] | None = None
    """(code, message) with ``FinishReason.ERROR``."""
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache (first output only)."""
    committed: tuple[int, ...] | None = None
    """With the first output of a landing that the source's engine has committed and nobody else yet: its
    ``Frozen.output_token_ids``."""


class RequestInfo(msgspec.Struct, frozen=True, gc=False):
    """One row of the per-request table of planners and ``dynamo status``."""

    request_id: RequestId
    phase: RequestPhase
    prompt_tokens: int
    output_tokens: int
    kv_blocks: int
    age_s: float
    priority: int = 0
    max_tokens: int | None = None
    preemptions: int = 0
    not_migratable: str | None = None


class EngineInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """Fixed properties of a started engine."""

    model: str
    fingerprint: str
    """Hash of model, dtype and KV layout; only engines with equal ones exchange KV."""
    block_size: int
    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    agents: tuple[AgentRef, ...]
    lanes: tuple[str, ...] = ()
    kv_bytes_per_token: int = 0
    lease_s: float = 60.0
    """Time for which the engine keeps the blocks of a frozen request with a silent owner."""
    steps_ahead: int = 0
    """Steps scheduled ahead of the running one; a freeze waits for them too."""
    weights: str = ""
    """Digest of the model's weights; empty without weights."""


class EngineStats(msgspec.Struct, frozen=True):
    """Load at one moment; token sums as Dynamo's forward-pass metrics define them."""

    running: int
    waiting: int
    frozen: int
    landing: int
    free_blocks: int
    total_blocks: int
    decode_kv_tokens: int = 0
    queued_prefill_tokens: int = 0
    scheduled_prefill_tokens: int = 0
    preemptions_total: int = 0
    leases_expired_total: int = 0
    """Requests ended because their owner was silent during a move."""
    step_s: float = 0.0
    """Duration of the last forward step."""
    kv_refused: dict[str, int] = {}
    """Copies refused and recomputed here, by error code."""


class Engine(Protocol):
    """A started engine. See the module docstring for the life of a request over two engines."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[GenerateOutput]:
        """Run a request. With ``landing`` the stream stays silent until ``commit``.

        The stream ends after an output with a ``finish_reason``. Closing it aborts the request.
        """
        ...

    async def abort(self, request_id: RequestId) -> None:
        """End a request in any phase and free its blocks; unknown ids are ignored."""
        ...

    async def offer(self, request_id: RequestId) -> KVOffer:
        """The full, computed blocks of a running or frozen request."""
        ...

    async def freeze(
        self, request_id: RequestId, commit_to: CommitTo | None = None, use_within_s: float = 0.0
    ) -> Frozen:
        """Stop generating after the step in flight and return the state. Idempotent.

        All tokens up to the frozen state have left through the ``generate`` stream, which stays open. With
        ``commit_to`` this engine may send the state, with ``use_within_s``, to the destination's at once. The caller
        commits it all the same, and ends that life if it resumes this one.
        """
        ...

    async def resume(self, request_id: RequestId) -> None:
        """Continue generating after ``freeze``."""
        ...

    async def release(self, request_id: RequestId) -> None:
        """The destination owns the request now: end the stream (``FROZEN``) and free the blocks."""
        ...

    async def landing_status(self, request_id: RequestId, wait_s: float = 0.0) -> LandingStatus:
        """Progress of a landing request. The engine may keep the answer until its round has ended, for ``wait_s``."""
        ...

    async def extend(self, request_id: RequestId, offer: KVOffer, tokens: tuple[int, ...]) -> None:
        """Another pre-copy round. ``tokens`` are all output tokens so far."""
        ...

    async def expect_commit(self, request_id: RequestId, hold_s: float) -> None:
        """A commit follows: begin no step before it, for ``hold_s`` at most. Returns after the commit or that time.

        The source freezes meanwhile. A commit in the middle of a step waits for its end (half a step on average) before
        the request's first step; a commit that the engine waits for does not.
        """
        ...

    async def commit(self, request_id: RequestId, frozen: Frozen) -> None:
        """Copy what is still missing and run. Blocks that cannot be copied or verified are recomputed.

        Does nothing more where the source's engine has committed the request. Raises ``NoRoom`` when the tail does
        not fit; nothing has changed then and the source can resume.
        """
        ...

    async def report(self) -> tuple[EngineStats, list[RequestInfo]]:
        """Load at this moment and the per-request table, with one interruption of the engine."""
        ...

    async def check_integrity(self) -> None:
        """Raise ``SessionError`` when blocks and requests do not add up (used by tests)."""
        ...
