# SPDX-License-Identifier: Apache-2.0
"""vLLM on GPUs with unequal tensor-parallel sizes: requests move both ways with the defaults of GPUs.

Every head of every block is compared after each move (``integrity: full``). In bfloat16 the order of sums differs
between the sizes, so tokens may differ where two are nearly equal; a wrong head would show in the log-probabilities.
Engine a has the first GPUs, engine b the last ones; they may share. The model is that of ``test_vllm_moves``.

    pytest -m slow -s tests/cuda/test_unequal_tp.py      prints lane, bytes, and times from freeze to next token
    DYN_MIGRATE_TEST_RANKS="2,2 1,2 2,4"                 pairs of sizes; without it 1,2 and, on four GPUs, 2,4
    DYN_MIGRATE_TEST_INTEGRITY=tail                      for times as users have them
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest
import torch

from components.engine.kv import CommitTo, RequestId
from components.engine.protocol import GenerateOutput, GenerateRequest, Sampling, TokenLogprob
from components.engine.vllm.engine import VLLMEngine
from tests.cuda.test_vllm_moves import make_model, require_whole, start
from tests.integration.families import taken_over
from tests.integration.moves import Client, move, request_of, run, take_until
from tests.integration.vllm_engines import Pair

GPUS = torch.cuda.device_count()
SIZES = os.environ.get("DYN_MIGRATE_TEST_RANKS", "1,2 2,4" if GPUS >= 4 else "1,2").split()
pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(GPUS < 2, reason="needs two NVIDIA GPUs"),
]

MOVES = 20
PROMPTS = [16, 1500, 6000]
CLOSE = 0.3
"""Difference of log-probabilities that rounding can make."""
SAMPLING = Sampling(temperature=0.0, max_tokens=600, ignore_eos=True, logprobs=5)
SHORT = Sampling(temperature=0.0, max_tokens=50, ignore_eos=True)


class Full(Client):
    """Keeps the log-probabilities of each token."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[TokenLogprob] = []

    def take(self, output: GenerateOutput) -> None:
        super().take(output)
        self.entries += output.logprobs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    maker = multiprocessing.get_context("spawn").Process(target=make_model, args=(str(folder),))
    maker.start()
    maker.join()
    assert maker.exitcode == 0
    return folder


@pytest.fixture(scope="module", params=SIZES)
def pair(runner: asyncio.Runner, model: Path, etcd_url: str, request: pytest.FixtureRequest) -> Iterator[Pair]:
    first, second = (int(word) for word in request.param.split(","))
    if max(first, second) > GPUS:
        pytest.skip(f"has {GPUS} GPUs")
    integrity = os.environ.get("DYN_MIGRATE_TEST_INTEGRITY", "full")
    pair = runner.run(start(model, etcd_url, (first, second), integrity=integrity))
    yield pair
    runner.run(pair.stop())


def require_close(found: Full, plain: Full) -> int:
    """Number of equal tokens at the front; what differs behind them was nearly equal."""
    for number, (token, other) in enumerate(zip(found.tokens, plain.tokens, strict=True)):
        assert abs(found.entries[number].logprob - plain.entries[number].logprob) < CLOSE, number
        if token != other:
            assert dict(plain.entries[number].top).get(token, -99.0) > plain.entries[number].logprob - CLOSE, number
            return number
    return len(plain.tokens)


async def whole(engine: VLLMEngine, request: GenerateRequest) -> Full:
    client = Full()
    async for output in engine.generate(request):
        client.take(output)
    return client


@pytest.mark.parametrize("prompt", PROMPTS)
def test_twenty_moves_there_and_back(runner: asyncio.Runner, pair: Pair, prompt: int) -> None:
    async def scenario() -> None:
        stayed = request_of(f"stayed-{prompt}", prompt, SAMPLING)
        plain = await whole(pair.a, stayed)
        moved = GenerateRequest(RequestId(f"moved-{prompt}"), stayed.prompt_token_ids, SAMPLING)
        client, lanes, copied = Full(), set(), 0
        waits: dict[bool, list[float]] = {True: [], False: []}
        stream: object = pair.a.generate(moved)
        source, target = pair.a, pair.b
        frozen = [0.0]

        def lead(to: CommitTo) -> CommitTo:
            frozen[0] = time.monotonic()
            return to

        for _ in range(MOVES):
            await take_until(stream, client, len(client.tokens) + 12)  # type: ignore[arg-type]
            stream = await move(source, target, moved, client, stream, True, lead=lead)
            await take_until(stream, client, len(client.tokens) + 1)  # type: ignore[arg-type]
            waits[source is pair.a].append(1000 * (time.monotonic() - frozen[0]))
            status = await target.landing_status(moved.request_id)
            lanes.add(status.lane)
            copied += status.bytes
            source, target = target, source
        async for output in stream:  # type: ignore[attr-defined]
            client.take(output)
        equal = require_close(client, plain)
        for there, times in waits.items():
            way = "a to b" if there else "b to a"
            print(f"{prompt} tokens, {way}: freeze to next token p50 {median(times):.1f} max {max(times):.1f} ms")
        print(f"{MOVES} moves, {copied / MOVES / 1e6:.1f} MB each by {sorted(lanes)}, {equal} tokens as unmoved")
        assert lanes == {"cuda_ipc/kernel"}
        for engine in (pair.a, pair.b):
            assert not (await engine.report())[0].kv_refused

    runner.run(asyncio.wait_for(scenario(), 300))


@pytest.mark.parametrize("way", [1, -1], ids=["a to b", "b to a"])
def test_prompts_are_handed_over(runner: asyncio.Runner, pair: Pair, way: int) -> None:
    async def scenario() -> None:
        both = Pair(*(pair.a, pair.b)[::way])
        for prompt in PROMPTS:
            asked = request_of(f"apart-{way}-{prompt}", prompt, SHORT)
            begun = time.monotonic()
            client, stream = await taken_over(both, asked)
            took = 1000 * (time.monotonic() - begun)
            async for output in stream:
                client.take(output)
            plain = await run(both.a, GenerateRequest(RequestId(f"alone-{prompt}"), asked.prompt_token_ids, SHORT))
            pairs = enumerate(zip(client.tokens, plain.tokens, strict=True))
            equal = next((n for n, (x, y) in pairs if x != y), len(plain.tokens))
            print(f"{prompt} tokens: {took:.1f} ms to the second token, the first {equal} as in one engine")
            assert not (await both.b.report())[0].kv_refused

    runner.run(asyncio.wait_for(scenario(), 120))


def test_no_block_is_lost(runner: asyncio.Runner, pair: Pair) -> None:
    runner.run(asyncio.wait_for(require_whole(pair), 60))
