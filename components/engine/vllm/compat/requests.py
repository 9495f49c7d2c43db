# SPDX-License-Identifier: Apache-2.0
"""Reads vLLM's ``Request``: the caller's id, and whether all of its state can travel."""

from __future__ import annotations

import re

from vllm.v1.request import Request

from components.engine.kv import RequestId

_INTERNAL = re.compile(r"(?P<external>.+)-[0-9a-f]{8}", re.DOTALL)


def external_id(request: Request) -> RequestId:
    """The id that the caller of ``AsyncLLM.generate`` chose.

    vLLM adds eight random hexadecimal digits to it (``InputProcessor.assign_request_id``), so that the id inside the
    engine names one life of a request. ``Request`` itself does not keep the caller's.
    """
    match = _INTERNAL.fullmatch(request.request_id)
    return RequestId(match["external"] if match else request.request_id)


def why_not_migratable(request: Request) -> str | None:
    """The part of this request's state that cannot travel, or None."""
    params = request.sampling_params
    if params is None:
        return "pooling: the request generates no tokens"
    if params.prompt_logprobs is not None:
        return "prompt_logprobs: they are produced once, during prefill"
    if request.resumable:
        return "streaming input: the rest of the prompt is still to come"
    if others := {feature.modality for feature in request.mm_features} - {"image"}:
        return f"multimodal input: {', '.join(sorted(others))} cannot travel"
    if request.prompt_token_ids is None or request.prompt_embeds is not None:
        return "prompt_embeds: the prompt is no list of tokens"
    return None
