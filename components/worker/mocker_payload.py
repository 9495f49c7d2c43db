# SPDX-License-Identifier: Apache-2.0
"""Dynamo's token-level request and response dictionaries, for the mocker, which lacks Dynamo's handlers.

Reads the fields that change the mocker's tokens or end its answers. Raises ``InvalidRequest`` for what it cannot do.
"""

from __future__ import annotations

from typing import Any

import msgspec

from components.engine.kv import RequestId
from components.engine.protocol import FinishReason, GenerateOutput, GenerateRequest, Sampling
from components.errors import InvalidRequest

_OPTIONS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "presence_penalty")
_FINISH = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "cancelled",
}


class _Stop(msgspec.Struct, frozen=True):
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: tuple[int, ...] | None = None
    stop_token_ids_hidden: tuple[int, ...] | None = None


class _Output(msgspec.Struct, frozen=True):
    logprobs: int | None = None


class _Routing(msgspec.Struct, frozen=True):
    priority: int | None = None


class _Payload(msgspec.Struct, frozen=True):
    token_ids: tuple[int, ...] = ()
    sampling_options: dict[str, Any] | None = None
    stop_conditions: _Stop | None = None
    output_options: _Output | None = None
    routing: _Routing | None = None


def to_request(request_id: str, payload: dict[str, Any], max_len: int) -> GenerateRequest:
    """One request of the frontend."""
    try:
        given = msgspec.convert(payload, _Payload, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"the request: {error}") from error
    options, stop = given.sampling_options or {}, given.stop_conditions or _Stop()
    room = max_len - len(given.token_ids)
    if not given.token_ids or room <= 0:
        raise InvalidRequest(f"the prompt has {len(given.token_ids)} tokens; 1 to {max_len - 1} are possible")
    for name in ("guided_decoding", "logit_bias"):
        if options.get(name) is not None:
            raise InvalidRequest(f"{name}: the mocker has no model that it could change")
    if (options.get("n") or 1) != 1:
        raise InvalidRequest("n > 1: the mocker gives one answer to a request")
    fields: dict[str, Any] = {key: options[key] for key in _OPTIONS if options.get(key) is not None}
    fields["max_tokens"] = min(stop.max_tokens or room, room)
    fields["min_tokens"] = stop.min_tokens or 0
    fields["ignore_eos"] = bool(stop.ignore_eos)
    fields["stop_token_ids"] = tuple({*(stop.stop_token_ids or ()), *(stop.stop_token_ids_hidden or ())})
    fields["logprobs"] = given.output_options.logprobs if given.output_options else None
    try:
        sampling = msgspec.convert(fields, Sampling, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"sampling parameters: {error}") from error
    # For Dynamo a higher priority is more important; the engine's queue takes the lowest number first.
    priority = -(given.routing.priority or 0) if given.routing else 0
    return GenerateRequest(RequestId(request_id), given.token_ids, sampling, priority=priority)


def chunk(output: GenerateOutput) -> dict[str, Any]:
    """An output in Dynamo's format."""
    data: dict[str, Any] = {"token_ids": list(output.token_ids), "index": 0}
    if output.logprobs:
        data["log_probs"] = [entry.logprob for entry in output.logprobs]
    if output.finish_reason is not None:
        data["finish_reason"] = _FINISH.get(output.finish_reason, f"error: {': '.join(output.error or ('', ''))}")
    return data
