# SPDX-License-Identifier: Apache-2.0
"""Families of models with other KV caches than Llama: moved answers equal those of unmoved requests."""

from __future__ import annotations

import asyncio
from importlib.util import find_spec
from typing import Any

import msgspec
import pytest
from vllm.sampling_params import RequestOutputKind

from components.engine.groups import tables_of
from components.engine.kv import RequestId
from components.engine.protocol import FinishReason, GenerateOutput, GenerateRequest, Sampling
from components.engine.vllm.control import MARKER, Marker, decode_lent, encode
from components.engine.vllm.engine import VLLMEngine
from tests.integration.test_vllm_handover import (
    Client,
    move,
    nothing_left,
    pair,
    request_of,
    run,
    take_until,
)
from tests.integration.vllm_engines import Pair

__all__ = ["nothing_left", "pair"]
pytestmark = pytest.mark.integration

FAMILIES: dict[str, dict[str, Any]] = {
    "gemma3": {"model": "tiny-gemma3", "num_gpu_blocks_override": 900},
    "gpt-oss": {"model": "tiny-gpt-oss", "num_gpu_blocks_override": 450},
    "deepseek-v3": {"model": "tiny-deepseek-v3", "num_gpu_blocks_override": 600, "block_size": 16},
    "qwen3-next": {"model": "tiny-qwen3-next", "num_gpu_blocks_override": 100},
    "paddleocr-vl": {"model": "tiny-paddleocr-vl", "limit_mm_per_prompt": {"image": 0}},
    "int8, FP8 KV": {"model": "tiny-llama-int8", "kv_cache_dtype": "fp8"},
}
NEEDS = {
    "paddleocr-vl": pytest.mark.skipif(find_spec("torchvision") is None, reason="vLLM starts it with torchvision alone")
}
HELD: dict[str, list[set[int]]] = {"gemma3": [{2, 3}] * 5, "gpt-oss": [{2, 3}], "qwen3-next": [{1}] * 3}
"""Blocks of the groups that do not keep everything: a window of 64 tokens is in two or three of 32, a state in one."""
SAMPLINGS = [
    Sampling(temperature=0.0, max_tokens=180, ignore_eos=True),
    Sampling(temperature=0.9, top_p=0.95, seed=7, max_tokens=180, ignore_eos=True),
    Sampling(temperature=0.8, seed=11, presence_penalty=0.9, repetition_penalty=1.2, max_tokens=180, ignore_eos=True),
]
PROMPTS = [5, 31, 64, 97, 300, 700, 990]
MODES = ["stop-and-copy", "live", "live", "replay"]
NO_REPLAY = {"deepseek-v3", "qwen3-next"}
"""On CPUs vLLM's prefill of compressed heads and of states does not agree with its decoding to the last bit."""


def mode_of(family: str, number: int) -> dict[str, bool]:
    """How a request is moved, as ``move`` takes it."""
    mode = MODES[number % len(MODES)]
    return {"live": mode == "live", "replay": mode == "replay" and family not in NO_REPLAY}


def with_each(caching: bool = True) -> pytest.MarkDecorator:
    parameters = [
        pytest.param(more | {"enable_prefix_caching": caching}, id=name, marks=NEEDS.get(name, ()))
        for name, more in FAMILIES.items()
    ]
    return pytest.mark.parametrize("pair", parameters, indirect=True)


def family_of(request: pytest.FixtureRequest) -> str:
    return next(name for name in FAMILIES if name in request.node.callspec.id)


async def moved_answers(pair: Pair, count: int, family: str) -> int:
    """Answers of ``count`` requests, each moved to and fro at other tokens; how many of them are as if unmoved."""
    equal = 0
    for number in range(count):
        sampling = SAMPLINGS[number % len(SAMPLINGS)]
        request = request_of(f"answer-{number}", PROMPTS[number % len(PROMPTS)] + number // len(PROMPTS), sampling)
        plain = await run(pair.a, request)
        client, source, target = Client(), pair.a, pair.b
        stream: object = source.generate(request)
        for stop in (6 + number % 7, 20 + number % 13, 40 + number % 32):
            await take_until(stream, client, stop)  # type: ignore[arg-type]
            stream = await move(source, target, request, client, stream, **mode_of(family, number))
            source, target = target, source
        async for output in stream:  # type: ignore[attr-defined]
            client.take(output)
        equal += client.tokens == plain.tokens
        if client.tokens != plain.tokens:
            first = next(i for i, (a, b) in enumerate(zip(client.tokens, plain.tokens, strict=False)) if a != b)
            print(f"answer {number} (prompt of {len(request.prompt_token_ids)}) differs from token {first} on")
    return equal


@with_each()
@pytest.mark.parametrize("count", [9, pytest.param(100, marks=pytest.mark.slow)])
def test_moved_answers_equal_unmoved_ones(
    runner: asyncio.Runner, pair: Pair, count: int, request: pytest.FixtureRequest
) -> None:
    assert runner.run(asyncio.wait_for(moved_answers(pair, count, family_of(request)), 30 + 6 * count)) == count
    for engine in (pair.a, pair.b):
        assert not runner.run(engine.stats()).kv_refused


@pytest.mark.slow
@with_each(caching=False)
def test_moved_answers_equal_unmoved_ones_without_a_prefix_cache(
    runner: asyncio.Runner, pair: Pair, request: pytest.FixtureRequest
) -> None:
    assert runner.run(asyncio.wait_for(moved_answers(pair, 100, family_of(request)), 630)) == 100


@pytest.mark.slow
@with_each(caching=False)
def test_a_replay_gives_what_vllm_makes_of_the_same_tokens(runner: asyncio.Runner, pair: Pair) -> None:
    """Also where vLLM's prefill and decoding round differently, so that it is not what an unmoved request gives."""

    async def scenario() -> None:
        for number, prompt in enumerate(PROMPTS):
            request = request_of(f"replayed-{number}", prompt, SAMPLINGS[0])
            client, stream = Client(), pair.a.generate(request)
            await take_until(stream, client, 30 + number)
            moved = await move(pair.a, pair.b, request, client, stream, live=False, replay=True)
            made = len(client.tokens)
            async for output in moved:  # type: ignore[attr-defined]
                client.take(output)
            tokens = (*request.prompt_token_ids, *client.tokens[:made])
            rest = msgspec.structs.replace(SAMPLINGS[0], max_tokens=len(client.tokens) - made)
            stock = await run(pair.b, GenerateRequest(RequestId(f"stock-{number}"), tokens, rest))
            assert client.tokens[made:] == stock.tokens, number

    runner.run(asyncio.wait_for(scenario(), 120))


@with_each()
def test_vllm_keeps_its_hybrid_cache_manager_and_windows_move_what_they_hold(
    runner: asyncio.Runner, pair: Pair, request: pytest.FixtureRequest
) -> None:
    async def scenario() -> None:
        long = request_of("long", 700, SAMPLINGS[0])
        stream = pair.a.generate(long)
        await take_until(stream, Client(), 5)
        frozen = await pair.a.freeze(long.request_id)
        await pair.a.abort(long.request_id)
        assert not pair.a._llm.vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
        *held, full = sorted(len(table.ids) for table in tables_of(frozen.offer))
        assert full == -(-frozen.offer.num_tokens // frozen.offer.block_size)
        wanted = HELD.get(family_of(request), [])
        assert len(held) == len(wanted) and all(count in counts for count, counts in zip(held, wanted, strict=True))

    runner.run(asyncio.wait_for(scenario(), 60))


async def decoded(engine: VLLMEngine, prompt: list[int], params: Any, name: str, made: int) -> Any:
    """What a decode engine gives, behind the tokens that were made elsewhere."""
    async for item in engine._llm.generate({"prompt_token_ids": prompt}, params, name):
        tokens, reason = tuple(item.outputs[0].token_ids), None
        if item.finished:
            aborted = item.outputs[0].finish_reason == "abort"
            reason = FinishReason.FROZEN if aborted else FinishReason.LENGTH
        yield GenerateOutput(made, () if reason is FinishReason.FROZEN else tokens, finish_reason=reason)
        made += len(tokens)


async def apart(pair: Pair, request: GenerateRequest) -> tuple[Client, Any]:
    """A request that one engine prefills and the other one decodes: its first token, and the stream of the others."""
    from vllm import SamplingParams

    def params(marker: Marker, **more: Any) -> Any:
        sampling = msgspec.structs.asdict(request.sampling)
        chosen = ("temperature", "top_p", "seed", "presence_penalty", "repetition_penalty", "max_tokens")
        given = {key: sampling[key] for key in chosen} | {"ignore_eos": True, "output_kind": RequestOutputKind.DELTA}
        return SamplingParams(extra_args={"kv_transfer_params": {MARKER: encode(marker)}}, **(given | more))

    name, tokens = request.request_id, list(request.prompt_token_ids)
    prefill = pair.a._llm.generate({"prompt_token_ids": tokens}, params(Marker(name, lend=True), max_tokens=1), name)
    [*_, item] = [output async for output in prefill]
    lent = decode_lent(item.kv_transfer_params[MARKER])
    first = list(lent.frozen.output_token_ids)
    taking = params(Marker(name, num_prompt_tokens=len(tokens), handoff=lent.frozen))
    stream = decoded(pair.b, tokens + first, taking, name, len(first))
    client = Client(list(first))
    client.take(await anext(stream))
    await pair.a.free_lent(lent.frozen.offer.request_id)
    return client, stream


@with_each()
@pytest.mark.parametrize(
    "kind", ["greedy", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("seeded", "penalties"))]
)
def test_a_decode_engine_takes_the_prompt_from_a_prefill_engine(
    runner: asyncio.Runner, pair: Pair, kind: str, request: pytest.FixtureRequest
) -> None:
    """And its request moves from there, in each mode."""
    family = family_of(request)
    sampling = dict(zip(("greedy", "seeded", "penalties"), SAMPLINGS, strict=True))[kind]

    async def scenario() -> None:
        for number in range(2 * len(MODES)):
            asked = request_of(f"apart-{kind}-{number}", (40, 300)[number % 2] + 17 * number, sampling)
            plain = await run(pair.a, msgspec.structs.replace(asked, request_id=RequestId(f"plain-{kind}-{number}")))
            client, stream = await apart(pair, asked)
            if number >= len(MODES):
                await take_until(stream, client, 30)
                stream = await move(pair.b, pair.a, asked, client, stream, **mode_of(family, number))
            async for output in stream:
                client.take(output)
            assert client.tokens == plain.tokens, (kind, number)
            assert not (await pair.b.stats()).kv_refused

    runner.run(asyncio.wait_for(scenario(), 120))
