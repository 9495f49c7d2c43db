# SPDX-License-Identifier: Apache-2.0
"""Requests that would end an engine, mostly by token ids: vLLM or this package refuses them first."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMClientError

from components.engine.vllm import checks
from tests.vllm_scheduler import Played

SIZE = 100
MODEL: Any = SimpleNamespace(
    get_vocab_size=lambda: SIZE, is_multimodal_model=False, max_logprobs=20, is_diffusion=False
)
IMAGES: Any = SimpleNamespace(get_vocab_size=lambda: SIZE, is_multimodal_model=True)


def engine(model: Any = MODEL, lora: object = None, device: str = "cpu") -> Any:
    """An engine's configuration."""
    return SimpleNamespace(model_config=model, lora_config=lora, device_config=SimpleNamespace(device_type=device))


def banned(*words: list[int]) -> SamplingParams:
    params = SamplingParams()
    # As Dynamo's handler sets them.
    params._bad_words_token_ids = list(words)
    return params


@pytest.mark.parametrize("token", [-1, SIZE, 60_000, 2**40])
@pytest.mark.parametrize("field", ["stop_token_ids", "allowed_token_ids", "logprob_token_ids", "logit_bias"])
def test_vllm_itself_refuses_unknown_ids(field: str, token: int) -> None:
    params = SamplingParams(**{field: {token: 1.0} if field == "logit_bias" else [1, token]})
    with pytest.raises(VLLMClientError, match=str(token)):
        params.verify(MODEL, None, None, None)


@pytest.mark.parametrize("word", [[SIZE], [1, 60_000], [-1], []])
def test_banned_words_of_unknown_ids_are_refused(word: list[int]) -> None:
    with pytest.raises(VLLMClientError, match="bad_words_token_ids"):
        checks.check([1], banned([1], word), engine())
    checks.check([1], banned([1], [0, SIZE - 1]), engine())


def test_prompts_are_held_against_the_model_and_not_against_its_tokenizer() -> None:
    with pytest.raises(VLLMClientError, match=r"\[100\] in prompt_token_ids"):
        checks.check([1, SIZE], SamplingParams(), engine())
    checks.check([0, SIZE - 1], SamplingParams(), engine())
    # Placeholders of images have no embedding of their own.
    checks.check([1, SIZE], SamplingParams(), engine(IMAGES))
    checks.check(None, SamplingParams(), engine())


@pytest.mark.parametrize("given", [[1], "text", 7])
def test_parameters_for_the_connector_that_are_no_object_are_refused(given: object, tiny_llama: str) -> None:
    """The scheduler reads them while it adds a request, where any error is the engine's end."""
    with pytest.raises((AttributeError, TypeError)):
        Played(tiny_llama).add([1, 2], extra_args={"kv_transfer_params": given})
    with pytest.raises(VLLMClientError, match="kv_transfer_params"):
        checks.check([1], SamplingParams(extra_args={"kv_transfer_params": given}), engine())
    for fine in (None, {}, {"do_remote_prefill": True}):
        checks.check([1], SamplingParams(extra_args={"kv_transfer_params": fine}), engine())


def test_log_probabilities_of_a_prompt_are_refused_where_they_end_the_engine() -> None:
    asked = SamplingParams(prompt_logprobs=1)
    with pytest.raises(VLLMClientError, match="prompt_logprobs while LoRA is enabled"):
        checks.check([1], asked, engine(lora=object()))
    for fine in (engine(), engine(lora=object(), device="cuda")):
        checks.check([1], asked, fine)
    checks.check([1], SamplingParams(), engine(lora=object()))
