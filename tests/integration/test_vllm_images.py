# SPDX-License-Identifier: Apache-2.0
"""Requests with images move between two real vLLM engines: their KV is copied, and pixels travel for a replay.

The model's tokens have positions in three dimensions, which follow from the images before them.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from PIL import Image
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from benchmarks.models import resolve
from components.engine.kv import RequestId
from components.engine.protocol import GenerateRequest
from components.engine.vllm import images, native
from components.engine.vllm.engine import VLLMEngine
from tests.integration.moves import Client, move, nothing_left, pair, run, take_until
from tests.integration.vllm_engines import Pair
from tests.pillow import sitecustomize

__all__ = ["nothing_left", "pair", "sitecustomize"]
MODEL = "tiny-paddleocr-vl"
IMAGE = 20
"""Tokens of a picture."""
pytestmark = [pytest.mark.integration, pytest.mark.parametrize("pair", [{"model": MODEL}], indirect=True, ids=[MODEL])]
GREEDY = {"temperature": 0.0}
SEEDED = {"temperature": 0.9, "seed": 7, "presence_penalty": 0.5}


def picture(seed: int) -> Image.Image:
    numbers = random.Random(seed)
    return Image.frombytes("RGB", (40, 30), numbers.randbytes(40 * 30 * 3))


async def asked(engine: VLLMEngine, name: str, seeds: list[int], length: int, **sampling: Any) -> GenerateRequest:
    """A request with an image for each seed among so many tokens, as a worker knows it from its first output on."""
    from transformers import AutoTokenizer

    placeholder = AutoTokenizer.from_pretrained(resolve(MODEL)).convert_tokens_to_ids("<image>")
    text = [(7 * i * i) % 40000 + 100 for i in range(length)]
    step = length // (len(seeds) + 1)
    for number in range(len(seeds)):
        text.insert((number + 1) * step, placeholder)
    prompt = {"prompt_token_ids": text, "multi_modal_data": {"image": [picture(seed) for seed in seeds]}}
    params = SamplingParams(max_tokens=70, ignore_eos=True, output_kind=RequestOutputKind.DELTA, **sampling)
    assert not native.why_fixed(prompt, params, {})
    given = native.encode(native.Native(params, images=images.of_prompt(prompt)))
    async for item in engine.llm.generate(prompt, SamplingParams(max_tokens=1), f"first-{name}"):
        expanded = tuple(item.prompt_token_ids)
    assert len(expanded) == length + IMAGE * len(seeds)
    return GenerateRequest(RequestId(name), expanded, native=given)


@pytest.mark.parametrize(
    ("sampling", "mode"),
    [
        pytest.param(sampling, mode, id=f"{kind}-{mode}", marks=[pytest.mark.slow] * ((kind == "seeded") == often))
        for kind, sampling in (("greedy", GREEDY), ("seeded", SEEDED))
        for mode, often in (("live", True), ("stop-and-copy", False), ("replay", True))
    ],
)
def test_answers_about_images_that_move_equal_unmoved_ones(
    runner: asyncio.Runner, pair: Pair, sampling: dict[str, Any], mode: str
) -> None:
    async def scenario() -> None:
        answers = []
        for number, seeds in enumerate(([1], [2], [1, 2, 3])):
            request = await asked(pair.a, f"plain-{mode}-{number}", seeds, 90, **sampling)
            plain = await run(pair.a, request)
            client, source, target = Client(), pair.a, pair.b
            request = await asked(pair.a, f"moved-{mode}-{number}", seeds, 90, **sampling)
            stream: object = source.generate(request)
            for stop in (5, 25, 45):
                await take_until(stream, client, stop + number)  # type: ignore[arg-type]
                how = {"live": mode == "live", "replay": mode == "replay"}
                stream = await move(source, target, request, client, stream, **how)
                source, target = target, source
            async for output in stream:  # type: ignore[attr-defined]
                client.take(output)
            assert client.tokens == plain.tokens, (number, mode)
            answers.append(plain.tokens)
        # Same tokens in the prompt, another image: neither engine takes one's blocks for the other's.
        assert answers[0] != answers[1]
        for engine in (pair.a, pair.b):
            assert not (await engine.report())[0].kv_refused

    runner.run(asyncio.wait_for(scenario(), 120))
