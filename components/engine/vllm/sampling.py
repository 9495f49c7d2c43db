# SPDX-License-Identifier: Apache-2.0
"""vLLM's parameters with this package's marker, and vLLM's outputs as the protocol's."""

from __future__ import annotations

from typing import Any

from vllm import SamplingParams

from components.engine.protocol import FinishReason, GenerateRequest, TokenLogprob
from components.engine.vllm.control import MARKER, Marker, encode
from components.engine.vllm.native import TRANSFER_KEY

_FINISH = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "abort": FinishReason.CANCELLED,
    "error": FinishReason.ERROR,
    "repetition": FinishReason.REPETITION,
}


def marked(params: SamplingParams, request: GenerateRequest) -> SamplingParams:
    """vLLM's parameters with the marker for the scheduler."""
    marker = Marker(
        request_id=request.request_id,
        num_prompt_tokens=len(request.prompt_token_ids),
        landing=request.landing,
    )
    params = params.clone()
    given = params.extra_args or {}
    transfer = {**(given.get(TRANSFER_KEY) or {}), MARKER: encode(marker)}
    params.extra_args = {**given, TRANSFER_KEY: transfer}
    return params


def finish_reason(reason: str | None) -> FinishReason | None:
    """vLLM's finish reason as the protocol's."""
    return None if reason is None else _FINISH.get(reason, FinishReason.ERROR)


def logprobs_of(rows: Any, token_ids: tuple[int, ...]) -> tuple[TokenLogprob, ...]:
    """vLLM's list of {token id: Logprob} as protocol structs, best alternatives first."""
    if not rows or not token_ids:
        return ()
    result = []
    # An output that vLLM joins with the end of an aborted request repeats older rows behind the new ones.
    for token_id, row in zip(token_ids, list(rows)[: len(token_ids)], strict=True):
        best = sorted(row.items(), key=lambda item: item[1].rank or 0)
        result.append(
            TokenLogprob(
                logprob=row[token_id].logprob,
                rank=row[token_id].rank or 0,
                top=tuple((tid, entry.logprob) for tid, entry in best),
            )
        )
    return tuple(result)
