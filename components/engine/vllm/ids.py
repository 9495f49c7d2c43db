# SPDX-License-Identifier: Apache-2.0
"""Token ids that a client sends are checked against the model before the engine sees them.

vLLM checks most of them itself: those of the prompt, of ``stop_token_ids``, ``logit_bias``, ``allowed_token_ids`` and
``logprob_token_ids``. Here is what it leaves out in the tested series. A wrong id would end the engine with all of its
requests, or, on a GPU, write where it must not.

Errors: vLLM's own ``VLLMValidationError``, of which Dynamo's handlers make a 400.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError


def check(tokens: Sequence[int] | None, params: SamplingParams, model: Any) -> None:
    """Raise for ids that the model does not have. ``model`` is vLLM's ``ModelConfig``; no ``tokens``: it checks them.

    vLLM lets the ids of the tokenizer pass in a prompt too, of which multimodal models have more than embeddings.
    """
    size = int(model.get_vocab_size())
    if tokens and not model.is_multimodal_model and max(tokens) >= size:
        raise _unknown("prompt_token_ids", [token for token in tokens if token >= size], size)
    for word in params._bad_words_token_ids or ():
        if not word or any(not 0 <= token < size for token in word):
            raise _unknown("bad_words_token_ids", list(word), size)


def _unknown(name: str, found: list[int], size: int) -> VLLMValidationError:
    return VLLMValidationError(
        f"token ids {found[:8]} in {name} are not in the model's vocabulary of {size}", parameter=name
    )
