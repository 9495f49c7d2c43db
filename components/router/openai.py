# SPDX-License-Identifier: Apache-2.0
"""Dynamo's token-level request and response dictionaries, to and from the engine protocol.

The frontend has tokenised the prompt and will detokenise and match stop strings itself. Defaults come from
the model's ``generation_config.json``, as with ``vllm serve``. Raises ``InvalidRequest``.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import msgspec

from components.engine.protocol import FinishReason, GenerateOutput, GenerateRequest, RequestId, Sampling
from components.errors import InvalidRequest

_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_OPTIONS = (*_DEFAULTS, "seed", "presence_penalty", "frequency_penalty", "n", "logit_bias")


class _Stop(msgspec.Struct, frozen=True):
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: tuple[int, ...] | None = None
    stop_token_ids_hidden: tuple[int, ...] | None = None


class _Output(msgspec.Struct, frozen=True):
    logprobs: int | None = None
    prompt_logprobs: int | None = None


class _Routing(msgspec.Struct, frozen=True):
    priority: int | None = None
    lora_name: str | None = None
    cache_salt: str | None = None


class _Payload(msgspec.Struct, frozen=True):
    """What of the frontend's request is read; the rest is for others."""

    token_ids: tuple[int, ...] | None = None
    sampling_options: dict[str, Any] | None = None
    stop_conditions: _Stop | None = None
    output_options: _Output | None = None
    routing: _Routing | None = None
    model: str | None = None


def default_sampling(model: str) -> dict[str, Any]:
    """Sampling defaults that the model's makers recommend."""
    path = Path(model) / "generation_config.json"
    if not path.is_file():
        return {}
    config = json.loads(path.read_text())
    return {key: config[key] for key in _DEFAULTS if config.get(key) is not None}


def to_request(
    request_id: str, payload: dict[str, Any], defaults: dict[str, Any], max_len: int, adapters: Collection[str] = ()
) -> GenerateRequest:
    """One request of the frontend, which names a LoRA adapter as the model."""
    try:
        given = msgspec.convert(payload, _Payload, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"the request: {error}") from error
    prompt = given.token_ids or ()
    if not prompt:
        raise InvalidRequest("the prompt is empty: send at least one token")
    if len(prompt) >= max_len:
        raise InvalidRequest(
            f"the prompt has {len(prompt)} tokens; this model's maximum context length is {max_len} tokens, "
            "prompt and answer together"
        )
    options, stop = given.sampling_options or {}, given.stop_conditions or _Stop()
    output, routing = given.output_options or _Output(), given.routing or _Routing()
    fields: dict[str, Any] = dict(defaults)
    fields |= {key: options[key] for key in _OPTIONS if options.get(key) is not None}
    if options.get("guided_decoding") is not None:
        fields["guided"] = msgspec.Raw(msgspec.json.encode(options["guided_decoding"]))
    fields["max_tokens"] = min(stop.max_tokens or max_len, max_len - len(prompt))
    fields["min_tokens"] = stop.min_tokens or 0
    if fields["min_tokens"] > fields["max_tokens"]:
        raise InvalidRequest(
            f"min_tokens = {fields['min_tokens']} is more than the {fields['max_tokens']} tokens that max_tokens and "
            "the model's length leave: lower it"
        )
    fields["ignore_eos"] = bool(stop.ignore_eos)
    fields["stop_token_ids"] = tuple({*(stop.stop_token_ids or ()), *(stop.stop_token_ids_hidden or ())})
    fields["logprobs"] = output.logprobs
    fields["prompt_logprobs"] = output.prompt_logprobs
    if fields.get("n", 1) != 1:
        raise InvalidRequest("n > 1 is not supported: send the request n times")
    try:
        sampling = msgspec.convert(fields, Sampling, strict=False, str_keys=True)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"sampling parameters: {error}") from error
    return GenerateRequest(
        request_id=RequestId(request_id),
        prompt_token_ids=prompt,
        sampling=sampling,
        priority=routing.priority or 0,
        lora_name=given.model if given.model in adapters else routing.lora_name,
        cache_salt=routing.cache_salt,
    )


def has_stop_strings(payload: dict[str, Any]) -> bool:
    """Whether the frontend may end this response, which ``to_request`` has accepted, at a text that it finds."""
    return bool((payload.get("stop_conditions") or {}).get("stop"))


class Responder:
    """Builds the chunks of one response.

    ``one_by_one`` gives each token a chunk of its own: a frontend that finds a stop string counts all tokens of its
    chunk, so the usage would depend on how many a busy engine had joined.
    """

    def __init__(self, tokenizer: Any, prompt_tokens: int, wants_logprobs: bool, one_by_one: bool) -> None:
        self._tokenizer = tokenizer
        self._prompt_tokens = prompt_tokens
        self._wants_logprobs = wants_logprobs
        self._one_by_one = one_by_one
        self._completion_tokens = 0
        self._cached_tokens = 0

    def chunks(self, output: GenerateOutput) -> Iterator[dict[str, Any]]:
        """An output in Dynamo's format."""
        last = len(output.token_ids) - 1
        if not self._one_by_one or last < 1:
            yield self._chunk(output)
            return
        for at, token in enumerate(output.token_ids):
            end = output if at == last else _UNFINISHED
            yield self._chunk(msgspec.structs.replace(end, token_ids=(token,), logprobs=output.logprobs[at : at + 1]))

    def _chunk(self, output: GenerateOutput) -> dict[str, Any]:
        self._completion_tokens += len(output.token_ids)
        self._cached_tokens = max(self._cached_tokens, output.cached_tokens)
        chunk: dict[str, Any] = {"token_ids": list(output.token_ids), "index": 0}
        if self._wants_logprobs and output.logprobs:
            chunk["log_probs"] = [entry.logprob for entry in output.logprobs]
            chunk["top_logprobs"] = [
                [self._alternative(rank, *pair) for rank, pair in enumerate(entry.top, 1)] for entry in output.logprobs
            ]
        if isinstance(output.stop_reason, int):
            chunk["stop_reason"] = output.stop_reason
        if output.finish_reason is not None:
            chunk["finish_reason"] = _FINISH.get(output.finish_reason, "error")
            chunk["completion_usage"] = {
                "prompt_tokens": self._prompt_tokens,
                "completion_tokens": self._completion_tokens,
                "total_tokens": self._prompt_tokens + self._completion_tokens,
                "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
            }
        return chunk

    def _alternative(self, rank: int, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._tokenizer.decode([token_id])
        return {
            "rank": rank,
            "token_id": token_id,
            "token": text,
            "logprob": logprob,
            "bytes": list(text.encode()),
        }


_UNFINISHED = GenerateOutput(0)
_FINISH = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "cancelled",
}
