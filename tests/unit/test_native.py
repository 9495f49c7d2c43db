# SPDX-License-Identifier: Apache-2.0
"""A request in vLLM's form: every field moves, or keeps the request in place with a reason."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from PIL import Image
from vllm import SamplingParams
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind, StructuredOutputsParams

from components.engine.protocol import FinishReason, GenerateOutput, TokenLogprob
from components.engine.vllm import images, native
from components.engine.vllm.sampling import finish_reason, logprobs_of
from components.errors import InvalidRequest
from tests.moved_fields import MOVED

REPEATS = RepetitionDetectionParams(max_pattern_size=3, min_pattern_size=1, min_count=4)
PROMPT = {"prompt_token_ids": [1, 2, 3]}


def test_every_sampling_parameter_is_known() -> None:
    known = MOVED | native.FIXED.keys() | {"n"}
    assert set(SamplingParams.__struct_fields__) == known


def test_every_parameter_travels() -> None:
    params = SamplingParams(
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        seed=3,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        repetition_penalty=1.1,
        max_tokens=9,
        min_tokens=2,
        stop_token_ids=[5],
        ignore_eos=True,
        logprobs=2,
        logit_bias={3: 1.0},
        structured_outputs=StructuredOutputsParams(json={"type": "object"}),
        allowed_token_ids=[3, 4],
        extra_args={"a": 1, native.TRANSFER_KEY: {"do_remote_prefill": True}},
        output_kind=RequestOutputKind.DELTA,
        detokenize=False,
    )
    given = native.Native(params, priority=-2, cache_salt="salt", session_id="s", reasoning_ended=True)
    found = native.decode(native.encode(given))
    # What a connector was told is this engine's own.
    params.extra_args = {"a": 1}
    assert found == given


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"n": 2}, "n > 1"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"thinking_token_budget": 5}, "thinking"),
        ({"logprob_token_ids": [4], "logprobs": None}, "logprob_token_ids"),
        ({"stop": ["end"], "detokenize": True}, "stop strings"),
    ],
)
def test_what_cannot_travel_says_so(change: dict[str, Any], word: str) -> None:
    assert word in native.why_fixed(PROMPT, SamplingParams(**change), {})


def test_prompts_that_are_more_than_tokens_and_hints_stay() -> None:
    assert native.why_fixed(PROMPT, SamplingParams(), {}) == ""
    assert "images" in native.why_fixed({**PROMPT, "multi_modal_data": {"image": 1}}, SamplingParams(), {})
    assert native.why_fixed({**PROMPT, "multi_modal_data": None}, SamplingParams(), {}) == ""
    assert "kv_hints" in native.why_fixed(PROMPT, SamplingParams(), {"kv_hints": object()})
    assert "rank 1" in native.why_fixed(PROMPT, SamplingParams(), {"data_parallel_rank": 1})


SQUARE = {**PROMPT, "multi_modal_data": {"image": [Image.new("RGB", (3, 2), (5, 6, 7))]}}


def test_images_travel_as_they_are() -> None:
    given = {**SQUARE, "multi_modal_uuids": {"image": ["a"]}, "mm_processor_kwargs": {"do_resize": False}}
    assert native.why_fixed(given, SamplingParams(), {}) == ""
    sent = native.decode(native.encode(native.Native(SamplingParams(), images=images.of_prompt(given))))
    assert sent.images is not None
    made = sent.images.prompt((8, 9))
    [image] = made["multi_modal_data"]["image"]
    assert (image.mode, image.size, image.tobytes()) == ("RGB", (3, 2), bytes((5, 6, 7)) * 6)
    assert made["prompt_token_ids"] == [*PROMPT["prompt_token_ids"], 8, 9]
    assert made["multi_modal_uuids"] == {"image": ["a"]} and made["mm_processor_kwargs"] == {"do_resize": False}


@pytest.mark.parametrize(
    ("data", "word"),
    [
        ({"image": ["http://x/y.png"]}, "embeddings"),
        ({"image": Image.new("CMYK", (2, 2))}, "embeddings"),
        ({"image": Image.new("RGB", (2, 2)), "audio": [1]}, "audio"),
        ({"image": Image.new("RGB", (3000, 2000))}, "18000000 bytes"),
    ],
)
def test_other_media_and_large_images_stay(data: dict[str, Any], word: str) -> None:
    assert word in native.why_fixed({**PROMPT, "multi_modal_data": data}, SamplingParams(), {})


def test_images_stay_with_disaggregated_prefill() -> None:
    params = SamplingParams(extra_args={"kv_transfer_params": {"do_remote_prefill": True}})
    assert "prefill" in native.why_fixed(SQUARE, params, {})


@pytest.mark.parametrize(
    "image", [("RGB", 3, 2, b"short"), ("XYZ", 1, 1, b"xyz"), ("L", -1, -1, b"x"), ("L", 0, 5, b"")]
)
def test_an_image_that_is_none_is_one_error(image: tuple[str, int, int, bytes]) -> None:
    with pytest.raises(InvalidRequest, match="an image"):
        images.Images((1,), (images.Image(*image),)).prompt(())


def test_an_answer_that_repeats_itself_ends_for_the_same_reason() -> None:
    found = native.decode(native.encode(native.Native(SamplingParams(repetition_detection=REPEATS))))
    assert found.params.repetition_detection == REPEATS
    reason = finish_reason("repetition")
    made = native.OutputFace("r", [1]).make(GenerateOutput(3, (7,), finish_reason=reason))
    assert made.finished and made.outputs[0].finish_reason == "repetition"


def test_a_damaged_ticket_is_one_error() -> None:
    with pytest.raises(InvalidRequest):
        native.decode(b"\x81\xa1x")


def test_a_ticket_with_values_that_vllm_refuses_is_one_error() -> None:
    hot = msgspec.msgpack.encode({"params": {"temperature": 1e300}})
    with pytest.raises(InvalidRequest, match="temperature"):
        native.decode(hot)


def test_outputs_come_back_as_vllm_gave_them() -> None:
    face = native.OutputFace("r", [1, 2])
    rows = (TokenLogprob(-0.5, 2, ((8, -0.1), (7, -0.5))),)
    own = [CompletionOutput(0, "", [], None, None)]
    for cached in (2, None):
        face.tokens(RequestOutput("r", None, [1], None, own, False, num_cached_tokens=cached))
    assert face.cached_tokens == 2
    made = face.make(GenerateOutput(3, (7,), rows, FinishReason.STOP, stop_reason=7, cached_tokens=2))
    assert (made.request_id, made.prompt_token_ids, made.finished) == ("r", [1, 2], True)
    assert made.num_cached_tokens == 2
    assert (made.outputs[0].finish_reason, made.outputs[0].stop_reason) == ("stop", 7)
    assert logprobs_of(made.outputs[0].logprobs, (7,)) == rows
    rest = face.without_end(made)
    assert rest is not None and not rest.finished and rest.outputs[0].finish_reason is None
    empty = RequestOutput("r", None, [1], None, [CompletionOutput(0, "", [], None, None)], True)
    assert face.without_end(empty) is None
