# SPDX-License-Identifier: Apache-2.0
"""What the router adds: the same requests to a worker directly and through the router, in turn, one at a time.

    python -m benchmarks.serving.hop COUNT < requests.json > samples.json      (a child of the benchmark)

Both ways use Dynamo's request plane from this process; the frontend, which is the same for both, is left out.
The workers are aggregated ones, so that no prefill hand-off is in the way.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

from components import process
from components.engine.protocol import GenerateOutput, GenerateRequest, RequestId, Sampling
from components.messages import Generate, pack, unpack

_PROMPT, _OUTPUT = 64, 32
_TURN = 10
"""Requests of one way before the other has its turn, so that either way takes the workers in turn. Request by request
the router would always take the one that was idle for longer, whose caches are cold: 2 ms of this prompt's 50."""


def _prompt(number: int) -> list[int]:
    # Another first token each time: no prefix cache helps either way.
    return [1000 + number, *range(100, 100 + _PROMPT - 1)]


async def _direct(client: Any, instance: int, number: int) -> AsyncIterator[int]:
    sampling = Sampling(temperature=0.0, max_tokens=_OUTPUT, ignore_eos=True)
    request = GenerateRequest(RequestId(f"hop-{number}"), tuple(_prompt(number)), sampling)
    stream = await client.direct(pack(Generate(request)), instance, annotated=False)
    async for item in stream:
        yield len(unpack(item, GenerateOutput).token_ids)


async def _routed(client: Any, instance: int, number: int) -> AsyncIterator[int]:
    payload = {
        "token_ids": _prompt(number),
        "sampling_options": {"temperature": 0.0},
        "stop_conditions": {"max_tokens": _OUTPUT, "ignore_eos": True},
    }
    stream = await client.direct(payload, instance, annotated=False)
    async for item in stream:
        yield len(item.get("token_ids") or ())


async def main(count: int) -> dict[str, list[list[float]]]:
    """Times of the tokens of each request, from its sending, for both ways; ``count`` is a multiple of ten."""
    runtime = process.connect()
    direct = await runtime.endpoint(f"{process.namespace()}.backend.generate").client()
    router = await runtime.endpoint(f"{process.edge_namespace()}.router.generate").client()
    workers, routers = await direct.wait_for_instances(), await router.wait_for_instances()
    found: dict[str, list[list[float]]] = {"direct": [], "routed": []}
    for number in range(2 * (count + _TURN)):
        way = "direct" if number // _TURN % 2 == 0 else "routed"
        if way == "direct":
            stream = _direct(direct, workers[number % len(workers)], number)
        else:
            stream = _routed(router, routers[0], number)
        began, times = time.perf_counter(), []
        async for tokens in stream:
            if tokens:
                times.append(round(time.perf_counter() - began, 6))
        if number >= 2 * _TURN:  # The first turn of each warms up.
            found[way].append(times)
    return found


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(int(sys.argv[1])))))
    sys.stdout.flush()
    os._exit(0)
