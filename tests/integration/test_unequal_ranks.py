# SPDX-License-Identifier: Apache-2.0
"""Two real vLLM engines of unequal tensor-parallel sizes: requests move both ways, and prompts are handed over.

In float32, where the order of sums hardly shows; all blocks are compared by their heads' checksums after each move.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from components.engine.kv import RequestId
from components.engine.protocol import GenerateRequest, Sampling
from tests.integration.families import taken_over
from tests.integration.moves import Client, move, nothing_left, pair, request_of, run, take_until
from tests.integration.vllm_engines import Pair

__all__ = ["nothing_left", "pair"]
pytestmark = [pytest.mark.integration, pytest.mark.slow]

# Without a prefix cache every answer is computed, or moved, as a whole.
COMMON: dict[str, Any] = {"dtype": "float32", "integrity": "full", "enable_prefix_caching": False}
PAIRS: dict[str, dict[str, Any]] = {
    "llama 1 2": {"ranks": (1, 2)},
    "gemma3 1 2": {"ranks": (1, 2), "model": "tiny-gemma3", "num_gpu_blocks_override": 900},
}
with_each = pytest.mark.parametrize(
    "pair", [pytest.param(more | COMMON, id=name) for name, more in PAIRS.items()], indirect=True
)
GREEDY = Sampling(temperature=0.0, max_tokens=60, ignore_eos=True)
PROMPTS = [5, 64, 300]


async def moved(pair: Pair, request: GenerateRequest, live: bool) -> tuple[Client, int]:
    """A request that moves three times, and the bytes that travelled."""
    client, copied = Client(), 0
    stream: object = pair.a.generate(request)
    source, target = pair.a, pair.b
    for stop in (6, 15, 27):
        await take_until(stream, client, stop)  # type: ignore[arg-type]
        stream = await move(source, target, request, client, stream, live)
        copied += (await target.landing_status(request.request_id)).bytes
        source, target = target, source
    async for output in stream:  # type: ignore[attr-defined]
        client.take(output)
    return client, copied


@with_each
def test_requests_move_both_ways_and_no_token_changes(runner: asyncio.Runner, pair: Pair) -> None:
    assert pair.a.info.fingerprint == pair.b.info.fingerprint
    assert len(pair.a.info.agents) != len(pair.b.info.agents)

    async def scenario() -> None:
        for number, prompt in enumerate(2 * PROMPTS):
            asked, live = request_of(f"moved-{number}", prompt + number, GREEDY), number < len(PROMPTS)
            client, copied = await moved(pair, asked, live)
            plain = await run(pair.a, msgspec.structs.replace(asked, request_id=RequestId(f"plain-{number}")))
            print(f"prompt of {prompt + number}, live {live}: {copied} bytes, same {client.tokens == plain.tokens}")
            assert client.tokens == plain.tokens and copied > 0
        for engine in (pair.a, pair.b):
            # Every head of every block arrived as it was.
            assert not (await engine.report())[0].kv_refused

    runner.run(asyncio.wait_for(scenario(), 300))


@with_each
def test_prompts_are_handed_over_both_ways(runner: asyncio.Runner, pair: Pair) -> None:
    async def scenario() -> None:
        for number, (way, prompt) in enumerate((way, prompt) for way in (1, -1) for prompt in PROMPTS):
            both = Pair(*(pair.a, pair.b)[::way])
            asked = request_of(f"apart-{number}", prompt + number, GREEDY)
            client, stream = await taken_over(both, asked)
            async for output in stream:
                client.take(output)
            plain = await run(both.a, msgspec.structs.replace(asked, request_id=RequestId(f"alone-{number}")))
            print(f"prompt of {prompt + number}, way {way}: same {client.tokens == plain.tokens}")
            assert client.tokens == plain.tokens
            assert not (await both.b.report())[0].kv_refused

    runner.run(asyncio.wait_for(scenario(), 300))
