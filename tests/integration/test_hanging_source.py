# SPDX-License-Identifier: Apache-2.0
"""A source that hangs during its moves: the destination's other requests continue."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from components.engine.kv import Frozen, RequestId
from components.engine.protocol import GenerateOutput, GenerateRequest, Sampling
from components.errors import RequestNotFound
from tests.integration.moves import Client, empty, request_of, take_until
from tests.integration.vllm_engines import Pair, start_pair

pytestmark = pytest.mark.integration
_DEADLINE_S = 5.0
"""Of each copy."""
_MOVED = 3
_ALONE = 400
"""Tokens of the destination's own request before anything else happens."""
_STEPS = 40
"""Far fewer than the destination makes within the deadline, far more than it makes if a step waits for the source."""


@pytest.mark.parametrize("lane", [{"transport": "tcp"}, {"backends": ("tcp",)}], ids=["NIXL", "plain TCP"])
async def test_a_source_that_stands_still_stops_nobody_at_the_destination(
    tiny_llama: str, etcd_url: str, lane: dict[str, Any]
) -> None:
    pair = await start_pair(tiny_llama, etcd_url, copy_deadline_s=_DEADLINE_S, **lane)
    try:
        await _hang(pair)
    finally:
        await pair.stop()


async def _hang(pair: Pair) -> None:
    greedy = Sampling(temperature=0.0, max_tokens=1900, ignore_eos=True)
    other = Client()
    staying = pair.b.generate(request_of("other", 40, greedy))
    arrivals: list[float] = []
    following = asyncio.ensure_future(_follow(staying, other, arrivals))
    while len(other.tokens) < _ALONE:
        await asyncio.sleep(0.05)
    names = [RequestId(f"moved-{number}") for number in range(_MOVED)]
    here = {name: pair.a.generate(request_of(name, 200, greedy)) for name in names}
    clients = {name: Client() for name in names}
    for name, stream in here.items():
        await take_until(stream, clients[name], 5)
    there = {}
    for name in names:
        origin = request_of(name, 200, greedy)
        tokens = tuple(clients[name].tokens)
        landing = GenerateRequest(name, origin.prompt_token_ids, greedy, tokens, landing=await pair.a.offer(name))
        there[name] = pair.b.generate(landing)
    firsts = {name: asyncio.ensure_future(anext(stream)) for name, stream in there.items()}  # type: ignore[arg-type]
    for name in names:
        await _landed(pair, name)
    frozen: dict[RequestId, Frozen] = {name: await pair.a.freeze(name) for name in names}
    core = pair.a.llm.engine_core.resources.engine_manager.processes[0].pid
    os.kill(core, signal.SIGSTOP)
    try:
        before, began = len(other.tokens), len(arrivals)
        for name in names:
            await pair.b.commit(name, frozen[name])
        committed = len(other.tokens)
        outputs = await asyncio.gather(*firsts.values())
        made, ended = len(other.tokens) - before, len(arrivals)
        refused = (await pair.b.report())[0].kv_refused
    finally:
        os.kill(core, signal.SIGCONT)
    print(f"{made} steps of the other request meanwhile, {committed - before} of them during the commits; {refused}")
    alone, beside = (np.percentile(np.diff(arrivals[a:b]), 99) * 1e3 for a, b in ((20, _ALONE), (began, ended)))
    print(f"p99 of its gaps: {alone:.1f} ms alone, {beside:.1f} ms while the source stood still, {beside / alone:.2f}")
    assert sum(refused.values()) == _MOVED and made >= _STEPS
    for name, output in zip(names, outputs, strict=True):
        assert output.index == len(frozen[name].output_token_ids)
    following.cancel()
    for engine, ids in ((pair.a, names), (pair.b, [*names, RequestId("other")])):
        for name in ids:
            await engine.abort(name)
    for stream in (staying, *here.values(), *there.values()):
        with suppress(Exception):
            async for _ in stream:
                continue
    for engine in (pair.a, pair.b):
        await asyncio.wait_for(empty(engine), 30)


async def _follow(stream: AsyncIterator[GenerateOutput], client: Client, arrivals: list[float]) -> None:
    async for output in stream:
        client.take(output)
        arrivals += [time.perf_counter()] * bool(output.token_ids)


async def _landed(pair: Pair, name: RequestId) -> None:
    while True:
        await asyncio.sleep(0.02)
        with suppress(RequestNotFound):
            if (await pair.b.landing_status(name)).landed:
                return
