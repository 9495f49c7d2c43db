# SPDX-License-Identifier: Apache-2.0
"""Requests with output tokens of another engine: in vLLM they are preempted ones.

vLLM continues a preempted request after its output tokens. The model runner gets all of its tokens when it runs.

Threading: the engine core's thread.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm.v1.request import Request, RequestStatus


def as_resumed(request: Request, num_prompt_tokens: int) -> bool:
    """Turn the end of the prompt into output tokens. True if there are any."""
    tokens = request.prompt_token_ids
    if tokens is None or len(tokens) <= num_prompt_tokens:
        return False
    request.prompt_token_ids = tokens[:num_prompt_tokens]
    request.num_prompt_tokens = num_prompt_tokens
    # ``_all_token_ids`` already has them.
    request._output_token_ids.extend(tokens[num_prompt_tokens:])
    _mark(request)
    return True


def append_tokens(request: Request, tokens: Sequence[int]) -> None:
    """Add output tokens to a request that does not run here yet."""
    request.append_output_token_ids(list(tokens))
    _mark(request)


def _mark(request: Request) -> None:
    if request.status == RequestStatus.WAITING:
        request.status = RequestStatus.PREEMPTED
    request.num_preemptions = max(1, request.num_preemptions)
    request.prefill_stats = None
