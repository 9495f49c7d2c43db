# SPDX-License-Identifier: Apache-2.0
"""Translates the protocol's sampling parameters and vLLM's outputs.

Stop strings are not part of them: Dynamo's frontend matches stop strings on the detokenised stream, which a move
does not change. Raises ``InvalidRequest`` for parameters that vLLM refuses.
"""

from __future__ import annotations

from typing import Any

import msgspec
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from components.engine.protocol import FinishReason, GenerateRequest, TokenLogprob
from components.engine.vllm.control import MARKER, Marker, encode
from components.engine.vllm.native import REFUSALS, TRANSFER_KEY
from components.errors import InvalidRequest

_FINISH = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "abort": FinishReason.CANCELLED,
    "error": FinishReason.ERROR,
    "repetition": FinishReason.REPETITION,
}


def to_vllm(request: GenerateRequest, max_model_len: int) -> SamplingParams:
    """vLLM's parameters; ``max_tokens`` counts from the first output token, of whatever worker."""
    s = request.sampling
    room = max_model_len - len(request.prompt_token_ids)
    if room <= 0:
        raise InvalidRequest(
            f"the prompt has {len(request.prompt_token_ids)} tokens; the model's maximum length is "
            f"{max_model_len}, prompt and answer together: shorten the prompt or raise max-model-len"
        )
    marker = Marker(
        request_id=request.request_id,
        num_prompt_tokens=len(request.prompt_token_ids),
        landing=request.landing,
        not_migratable=s.why_not_migratable(),
    )
    try:
        params = SamplingParams(
            temperature=s.temperature,
            top_p=s.top_p,
            top_k=s.top_k,
            min_p=s.min_p,
            seed=s.seed,
            presence_penalty=s.presence_penalty,
            frequency_penalty=s.frequency_penalty,
            repetition_penalty=s.repetition_penalty,
            max_tokens=min(room, s.max_tokens) if s.max_tokens is not None else room,
            min_tokens=s.min_tokens,
            stop_token_ids=list(s.stop_token_ids),
            ignore_eos=s.ignore_eos,
            logprobs=s.logprobs,
            prompt_logprobs=s.prompt_logprobs,
            logit_bias=s.logit_bias,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            structured_outputs=_guided(s.guided),
            extra_args={"kv_transfer_params": {MARKER: encode(marker)}},
        )
    except REFUSALS as error:
        raise InvalidRequest(str(error)) from error
    if s.bad_words_token_ids:
        # vLLM has no public way to give bad words as token ids.
        params._bad_words_token_ids = [list(word) for word in s.bad_words_token_ids]
    return params


def marked(params: SamplingParams, request: GenerateRequest) -> SamplingParams:
    """vLLM's parameters with the marker for the scheduler."""
    marker = Marker(
        request_id=request.request_id,
        num_prompt_tokens=len(request.prompt_token_ids),
        landing=request.landing,
        not_migratable=None,
    )
    params = params.clone()
    given = params.extra_args or {}
    transfer = {**(given.get(TRANSFER_KEY) or {}), MARKER: encode(marker)}
    params.extra_args = {**given, TRANSFER_KEY: transfer}
    return params


def _guided(options: msgspec.Raw | None) -> StructuredOutputsParams | None:
    if options is None:
        return None
    try:
        fields = msgspec.json.decode(bytes(options), type=dict[str, Any])
        known = {"json", "regex", "choice", "grammar", "whitespace_pattern", "structural_tag"}
        given = {key: value for key, value in fields.items() if key in known and value is not None}
        return StructuredOutputsParams(**given) if given else None
    except (msgspec.DecodeError, *REFUSALS) as error:
        raise InvalidRequest(f"guided decoding: {error}") from error


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
