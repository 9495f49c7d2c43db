# SPDX-License-Identifier: Apache-2.0
"""Refuses requests that would end the engine and all of its requests.

Token ids: vLLM checks those of the prompt, of ``stop_token_ids``, ``logit_bias``, ``allowed_token_ids`` and
``logprob_token_ids``; this module checks what the tested series leaves out. On a GPU a wrong id corrupts memory.
``prompt_logprobs`` on a CPU worker with LoRA: vLLM's step fails. ``kv_transfer_params`` that are no object: its
scheduler does, while it adds the request.

Errors: vLLM's ``VLLMValidationError``, which Dynamo's handlers turn into a 400.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from components.engine.vllm.native import TRANSFER_KEY


def check(tokens: Sequence[int] | None, params: SamplingParams, config: Any) -> None:
    """Raise for such a request. ``config`` is the engine's ``VllmConfig``; without ``tokens`` the prompt is not text.

    vLLM lets the ids of the tokenizer pass in a prompt too, of which multimodal models have more than embeddings.
    """
    model = config.model_config
    size = int(model.get_vocab_size())
    if tokens and not model.is_multimodal_model and max(tokens) >= size:
        raise _unknown("prompt_token_ids", [token for token in tokens if token >= size], size)
    for word in params._bad_words_token_ids or ():
        if not word or any(not 0 <= token < size for token in word):
            raise _unknown("bad_words_token_ids", list(word), size)
    if not isinstance((params.extra_args or {}).get(TRANSFER_KEY), dict | None):
        raise VLLMValidationError(f"{TRANSFER_KEY} is no object", parameter=TRANSFER_KEY)
    wanted = params.prompt_logprobs is not None and config.lora_config is not None
    if wanted and config.device_config.device_type == "cpu":
        raise VLLMValidationError(
            "on CPUs vLLM computes no prompt_logprobs while LoRA is enabled; ask a worker without it",
            parameter="prompt_logprobs",
        )


def _unknown(name: str, found: list[int], size: int) -> VLLMValidationError:
    return VLLMValidationError(
        f"token ids {found[:8]} in {name} are not in the model's vocabulary of {size}", parameter=name
    )
