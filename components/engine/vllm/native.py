# SPDX-License-Identifier: Apache-2.0
"""A request and its outputs in vLLM's form, on their way to another engine and back.

``Native`` carries all arguments of ``AsyncLLM.generate``, so that no parameter is translated or dropped.
``why_fixed`` names what cannot travel exactly. ``OutputFace`` reads ``RequestOutput`` for
``components.migration.requests``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from vllm import SamplingParams
from vllm.exceptions import VLLMClientError
from vllm.logprobs import Logprob
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.v1.engine.exceptions import EngineDeadError

from components.engine.protocol import FinishReason, GenerateOutput
from components.engine.vllm import images
from components.engine.vllm.images import Images
from components.errors import InvalidRequest, WorkerLost

MAX_BYTES = 16 << 20
TRANSFER_KEY = "kv_transfer_params"
REFUSALS = (ValueError, TypeError, VLLMClientError)
"""Errors of vLLM for a request that it refuses."""
_REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.REPETITION: "repetition",
    FinishReason.CANCELLED: "abort",
    FinishReason.ERROR: "error",
}
_KNOWN_PROMPT_KEYS = frozenset({"prompt_token_ids", "cache_salt", "prompt", "type", "arrival_time"})


class Native(msgspec.Struct, frozen=True, omit_defaults=True):
    """Arguments of ``AsyncLLM.generate`` except the prompt's tokens and the request's id."""

    params: SamplingParams
    priority: int = 0
    lora: LoRARequest | None = None
    adapter: str = ""
    """Digest of the LoRA adapter's contents."""
    cached_tokens: int | None = None
    """Cached tokens of the prompt at the request's first worker, which is what clients are billed for; None: this is
    the first one."""
    cache_salt: str | None = None
    session_id: str | None = None
    trace_headers: dict[str, str] | None = None
    reasoning_ended: bool | None = None
    reasoning_parser_kwargs: dict[str, Any] | None = None
    images: Images | None = None

    def keywords(self) -> dict[str, Any]:
        """Keyword arguments for ``AsyncLLM.generate``."""
        return {
            "priority": self.priority,
            "lora_request": self.lora,
            "session_id": self.session_id,
            "trace_headers": self.trace_headers,
            "reasoning_ended": self.reasoning_ended,
            "reasoning_parser_kwargs": self.reasoning_parser_kwargs,
        }


def encode(native: Native) -> bytes:
    """As bytes for a ticket, without the marker of this engine's copy."""
    return msgspec.msgpack.encode(msgspec.structs.replace(native, params=with_transfer(native.params, {})))


def transfer_of(params: SamplingParams) -> dict[str, Any]:
    """The KV connector's parameters of a request."""
    given = (params.extra_args or {}).get(TRANSFER_KEY)
    return given if isinstance(given, dict) else {}


def with_transfer(params: SamplingParams, transfer: dict[str, Any]) -> SamplingParams:
    """A copy with these parameters alone for the connector."""
    extra = {k: v for k, v in (params.extra_args or {}).items() if k != TRANSFER_KEY}
    if transfer:
        extra[TRANSFER_KEY] = transfer
    params = params.clone()
    params.extra_args = extra or None
    return params


def decode(data: bytes) -> Native:
    """Read a ticket's bytes. Raises ``InvalidRequest`` when they are malformed or too large."""
    if len(data) > MAX_BYTES:
        raise InvalidRequest(f"a request of {len(data)} bytes; {MAX_BYTES} are allowed")
    try:
        return msgspec.msgpack.decode(data, type=Native)
    except (msgspec.DecodeError, RecursionError, AssertionError, *REFUSALS) as error:
        # vLLM asserts that an adapter has a path.
        raise InvalidRequest(f"a request that this vLLM cannot read: {error}") from error


def prompt_tokens(prompt: Any) -> list[int] | None:
    """Token ids of a prompt of token ids alone; None for images, embeddings and raw text."""
    if not isinstance(prompt, Mapping) or _more(prompt):
        return None
    tokens = prompt.get("prompt_token_ids")
    return tokens if isinstance(tokens, list) else None


def _more(prompt: Mapping[str, Any]) -> set[str]:
    return {key for key, value in prompt.items() if value} - _KNOWN_PROMPT_KEYS


def _why_prompt_stays(prompt: Any) -> str:
    if prompt_tokens(prompt) is not None:
        return ""
    if isinstance(prompt, Mapping) and _more(prompt) <= images.KEYS:
        return images.why_stay(prompt)
    return images.MORE


FIXED = {
    "prompt_logprobs": "prompt_logprobs: they are produced once, during prefill",
    "prompt_logprob_token_ids": "prompt_logprob_token_ids: they are produced once, during prefill",
    "prompt_logprob_start": "prompt_logprob_start: they are produced once, during prefill",
    "thinking_token_budget": "thinking budget: what has been thought so far does not travel",
    "logprob_token_ids": "logprob_token_ids: their ranks do not travel",
    "flat_logprobs": "flat_logprobs: log-probabilities travel as rows",
    "routed_experts_prompt_start": "routed experts: they are collected by one engine",
    "trace_decode_token_ids": "trace_decode_token_ids: one engine traces",
}
"""Fields that keep a request at its worker when set, with the reason."""


def why_fixed(prompt: Any, params: SamplingParams, keywords: Mapping[str, Any]) -> str:
    """Why this request cannot move exactly; empty: it can. ``keywords`` are those of ``AsyncLLM.generate``."""
    if reason := _why_prompt_stays(prompt):
        return reason
    if prompt_tokens(prompt) is None and transfer_of(params):
        return "images: they stay with disaggregated prefill"
    if params.n > 1:
        return "n > 1: the samples share one request"
    for field, reason in FIXED.items():
        if getattr(params, field) not in (None, False):
            return reason
    if params.detokenize and params.stop:
        return "stop strings that vLLM looks for itself: the text so far does not travel"
    if rank := keywords.get("data_parallel_rank"):
        return f"data-parallel rank {rank}: only engines of one rank move requests"
    if keywords.get("kv_hints") is not None:
        return "kv_hints: they name blocks of this engine"
    return ""


def why_engine_fixes(config: Any) -> str:
    """Why requests of an engine with this ``VllmConfig`` cannot move exactly; empty: they can."""
    if config.aux_output_config.enabled:
        return "routed experts: they are collected by one engine"
    if config.model_config.return_sampling_mask:
        return "sampling masks: they are collected by one engine"
    return ""


def why_attached(params: SamplingParams) -> str:
    """Why Dynamo's frontend does not repeat this request; empty: it does."""
    if params.structured_outputs is not None:
        return "guided decoding: the frontend does not repeat it"
    if params.n > 1:
        return "n > 1: the frontend does not repeat it"
    return ""


class OutputFace:
    """``components.migration.requests.Face`` of ``RequestOutput`` (DELTA)."""

    def __init__(self, request_id: str, prompt_token_ids: list[int] | None) -> None:
        self._request_id = request_id
        self.prompt = prompt_token_ids
        """With images, as vLLM has made it of them: known from the first output on."""
        self.cached_tokens = 0
        """The engine's data about the prompt."""

    def tokens(self, item: RequestOutput) -> Sequence[int]:
        """New tokens of the first sample."""
        self.cached_tokens = item.num_cached_tokens or self.cached_tokens
        self.prompt = self.prompt or item.prompt_token_ids
        return item.outputs[0].token_ids if item.outputs else ()

    def finished(self, item: RequestOutput) -> bool:
        """True for the last output of its stream."""
        return bool(item.finished)

    def without_end(self, item: RequestOutput) -> RequestOutput | None:
        """The output without its finish reason; None when it has no token."""
        if not self.tokens(item):
            return None
        rest = copy.copy(item)
        rest.finished = False
        sample = copy.copy(item.outputs[0])
        sample.finish_reason = sample.stop_reason = None
        # An output that vLLM joins with the end of an aborted request repeats older rows behind the new ones.
        if sample.logprobs is not None:
            rows: Any = list(sample.logprobs)[: len(sample.token_ids)]
            sample.logprobs = rows
        rest.outputs = [sample]
        return rest

    def make(self, output: GenerateOutput) -> RequestOutput:
        """An output of another engine in vLLM's form. Raises ``RuntimeError`` for its error; for a dead engine vLLM's
        error, with which Dynamo's worker ends and the frontend repeats the request.
        """
        if output.finish_reason is FinishReason.ERROR:
            code, text = output.error or ("internal", "the engine ended the request")
            raise EngineDeadError() if code == WorkerLost.code else RuntimeError(f"{code}: {text}")
        reason = None if output.finish_reason is None else _REASONS.get(output.finish_reason, "stop")
        rows = [
            # The sampled token comes first, as in vLLM's own rows.
            {token: Logprob(row.logprob, rank=row.rank or None)}
            | {other: Logprob(value, rank=n + 1) for n, (other, value) in enumerate(row.top) if other != token}
            for token, row in zip(output.token_ids, output.logprobs, strict=False)
        ]
        return RequestOutput(
            request_id=self._request_id,
            prompt=None,
            prompt_token_ids=self.prompt,
            prompt_logprobs=None,
            outputs=[
                CompletionOutput(
                    index=0,
                    text="",
                    token_ids=list(output.token_ids),
                    cumulative_logprob=None,
                    logprobs=rows or None,
                    finish_reason=reason,
                    stop_reason=output.stop_reason,
                )
            ],
            finished=reason is not None,
            num_cached_tokens=output.cached_tokens,
        )
