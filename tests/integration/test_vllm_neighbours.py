# SPDX-License-Identifier: Apache-2.0
"""Requests move between engines that also offload KV to host memory: vLLM's ``OffloadingConnector`` beside ours.

Its scheduler, cache and protocol are vLLM's; only the copies are ours (``benchmarks/migration/host.py``), as vLLM's own
are for GPUs. They end the engine if a block is written before it has been offloaded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing

import pytest
from vllm.config import KVTransferConfig

from components.engine.protocol import Sampling
from tests.integration.moves import Client, empty, move, nothing_left, request_of, run, take_until
from tests.integration.vllm_engines import Pair, start_pair

__all__ = ["nothing_left"]
pytestmark = pytest.mark.integration
HOST = {
    "spec_name": "HostSpec",
    "spec_module_path": "benchmarks.migration.host",
    "cpu_bytes_to_use": 64 << 20,
    "offload_prompt_only": False,
}


@pytest.fixture(scope="module")
def pair(runner: asyncio.Runner, tiny_llama: str, etcd_url: str) -> Iterator[Pair]:
    transfer = KVTransferConfig(kv_connector="OffloadingConnector", kv_role="kv_both", kv_connector_extra_config=HOST)
    pair = runner.run(
        start_pair(
            tiny_llama,
            etcd_url,
            dtype="float32",
            max_model_len=1500,
            num_gpu_blocks_override=60,
            kv_transfer_config=transfer,
        )
    )
    yield pair
    runner.run(pair.stop())


def name(kind: str, number: int) -> str:
    """Names of one length have the same prompt."""
    return kind + "x" * number


async def to_and_fro(pair: Pair, number: int) -> tuple[Client, Client]:
    """A request that moves three times among others, and the same one unmoved, on an engine that has it offloaded."""
    sampling = Sampling(temperature=0.0, max_tokens=150, ignore_eos=True)
    request = request_of(name("r", number), 300 + 37 * number, sampling)
    client, source, target = Client(), pair.a, pair.b
    stream: object = source.generate(request)
    for stop in (5, 40, 80):
        await take_until(stream, client, stop + number)  # type: ignore[arg-type]
        stream = await move(source, target, request, client, stream, live=bool(stop % 40))
        source, target = target, source
    async for output in stream:  # type: ignore[attr-defined]
        client.take(output)
    plain = request_of(name("p", number), 300 + 37 * number, sampling)
    return client, await run(pair.a, plain)


def test_requests_move_beside_kv_that_is_offloaded(runner: asyncio.Runner, pair: Pair) -> None:
    """Blocks are few: what has ended is evicted, and comes back from host memory when it is asked for again."""

    async def scenario() -> None:
        for number in range(12):
            moved, plain = await to_and_fro(pair, number)
            assert moved.tokens == plain.tokens, number
        loaded = 0
        for number in range(12):
            request = request_of(name("q", number), 300 + 37 * number, Sampling(temperature=0.0, max_tokens=40))
            for engine in (pair.a, pair.b):
                async with aclosing(engine.generate(request)) as outputs:
                    loaded += (await anext(outputs)).cached_tokens  # type: ignore[call-overload]
                await empty(engine)
        assert loaded > 12 * 300
        for engine in (pair.a, pair.b):
            assert not (await engine.report())[0].kv_refused

    runner.run(asyncio.wait_for(scenario(), 240))


def test_a_request_that_is_preempted_comes_back_from_host_memory_and_moves(runner: asyncio.Runner, pair: Pair) -> None:
    async def scenario() -> None:
        sampling = Sampling(temperature=0.0, max_tokens=300, ignore_eos=True)
        plain = [await run(pair.b, request_of(f"plain-{n}", 400 + n, sampling)) for n in range(4)]
        requests = [request_of(f"press-{n}", 400 + n, sampling) for n in range(4)]
        running = [asyncio.ensure_future(run(pair.a, request)) for request in requests]
        pressed = [await each for each in running]
        assert (await pair.a.report())[0].preemptions_total
        assert [each.tokens for each in pressed] == [each.tokens for each in plain]

    runner.run(asyncio.wait_for(scenario(), 120))
