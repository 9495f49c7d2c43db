# SPDX-License-Identifier: Apache-2.0
"""Requests that move between vLLM engines with other settings: no token changes either."""

from __future__ import annotations

import asyncio

import pytest

from components.engine.kv import RequestId
from components.engine.protocol import FinishReason, GenerateRequest, Sampling
from components.errors import NotMigratable
from tests.integration.moves import (
    SAMPLINGS,
    Client,
    move,
    moved_to_and_fro,
    nothing_left,
    pair,
    request_of,
    run,
    take_until,
)
from tests.integration.vllm_engines import Pair

__all__ = ["nothing_left", "pair"]
pytestmark = pytest.mark.integration


@pytest.mark.slow
@pytest.mark.parametrize("pair", [{"wait_bytes": 0}], indirect=True, ids=["copies beside the steps"])
@pytest.mark.parametrize("live", [True, False], ids=["live", "stop-and-copy"])
@pytest.mark.parametrize("kind", list(SAMPLINGS))
def test_no_token_changes_when_every_copy_runs_beside_the_steps(
    runner: asyncio.Runner, pair: Pair, kind: str, live: bool
) -> None:
    moved_to_and_fro(runner, pair, kind, 700, live)


@pytest.mark.slow
@pytest.mark.parametrize("pair", [{"async_scheduling": False}], indirect=True, ids=["one step at a time"])
@pytest.mark.parametrize("kind", list(SAMPLINGS))
def test_no_token_changes_with_the_scheduler_that_does_not_run_ahead(
    runner: asyncio.Runner, pair: Pair, kind: str
) -> None:
    moved_to_and_fro(runner, pair, kind, 64, live=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "pair", [{"logits_processors": ["tests.integration.processors:Rotating"]}], indirect=True, ids=["logits processor"]
)
@pytest.mark.parametrize("live", [True, False], ids=["live", "stop-and-copy"])
@pytest.mark.parametrize("kind", ["greedy", "penalties"])
def test_a_logits_processor_goes_on_from_the_tokens(runner: asyncio.Runner, pair: Pair, kind: str, live: bool) -> None:
    """vLLM gives it those so far, as after a preemption."""
    moved_to_and_fro(runner, pair, kind, 64, live)


DRAFTS = {
    "ngram": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 2, "prompt_lookup_max": 4},
    "draft model": {"method": "draft_model", "num_speculative_tokens": 3},
    "eagle": {"method": "eagle", "num_speculative_tokens": 3},
    "mtp": {"method": "mtp", "num_speculative_tokens": 1},
}
OF_MODEL = {"mtp": {"model": "tiny-mimo"}}
"""Models that draft themselves."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "pair",
    [
        pytest.param({"drafts": drafts, "dtype": "float32"} | OF_MODEL.get(name, {}), id=name)
        for name, drafts in DRAFTS.items()
    ],
    indirect=True,
)
@pytest.mark.parametrize("live", [True, False], ids=["live", "stop-and-copy"])
@pytest.mark.parametrize("prompt", [31, 700])
@pytest.mark.parametrize("kind", ["greedy", "logprobs"])
def test_no_token_changes_with_drafts(runner: asyncio.Runner, pair: Pair, kind: str, prompt: int, live: bool) -> None:
    moved_to_and_fro(runner, pair, kind, prompt, live)


@pytest.mark.slow
@pytest.mark.parametrize("pair", [pytest.param({"drafts": DRAFTS["ngram"]}, id="ngram")], indirect=True)
def test_a_seeded_request_beside_drafts_stays(runner: asyncio.Runner, pair: Pair) -> None:
    async def scenario() -> None:
        request = request_of("seeded-with-drafts", 40, SAMPLINGS["seeded"])
        stream, client = pair.a.generate(request), Client()
        await take_until(stream, client, 5)
        with pytest.raises(NotMigratable, match="seed"):
            await pair.a.freeze(request.request_id)
        async for output in stream:
            client.take(output)
        assert client.finish is FinishReason.LENGTH

    runner.run(asyncio.wait_for(scenario(), 60))


@pytest.mark.slow
@pytest.mark.parametrize("pair", [{"model": "smollm2", "dtype": "bfloat16"}], indirect=True, ids=["bfloat16"])
@pytest.mark.parametrize("live", [True, False], ids=["live", "stop-and-copy"])
@pytest.mark.parametrize(("temperature", "seed"), [(0.0, None), (0.7, 11), (1.5, 5)])
def test_no_bit_of_a_log_probability_changes_in_bfloat16(
    runner: asyncio.Runner, pair: Pair, temperature: float, seed: int | None, live: bool
) -> None:
    """Below the length from which the attention kernel's order of summing depends on the step."""

    async def scenario() -> None:
        sampling = Sampling(temperature=temperature, seed=seed, max_tokens=200, ignore_eos=True, logprobs=0)
        for prompt in (7, 60, 200):
            request = request_of(f"bf-{temperature}-{prompt}-{live}", prompt, sampling)
            client, source, target = Client(), pair.a, pair.b
            stream: object = source.generate(request)
            for stop in (6, 40, 80, 120, 160):
                await take_until(stream, client, stop)  # type: ignore[arg-type]
                stream = await move(source, target, request, client, stream, live)
                source, target = target, source
            async for output in stream:  # type: ignore[attr-defined]
                client.take(output)
            plain = await run(pair.a, GenerateRequest(RequestId("plain"), request.prompt_token_ids, sampling))
            assert (client.tokens, client.logprobs) == (plain.tokens, plain.logprobs)

    runner.run(asyncio.wait_for(scenario(), 200))
