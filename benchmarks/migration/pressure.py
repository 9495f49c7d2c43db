# SPDX-License-Identifier: Apache-2.0
"""Ways to handle requests with KV that no longer fits: ``python -m benchmarks.migration.pressure --json out.json``.

    room       a sufficient cache, for comparison
    recompute  vLLM preempts a request and computes its KV again
    offload    the same, with vLLM's ``OffloadingConnector`` beside this package's: KV returns from host memory
    migrate    a request moves to another engine that has room, as soon as few blocks are left

Answers grow at the same time, greedily, in a cache for about two thirds of them. Host memory is written and read by
``host.py``, as vLLM's own copies are for GPUs.
"""

from __future__ import annotations

import asyncio
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import typer

from benchmarks.migration.engines import Answer, engines, greedy, move, program, tell
from components import models
from components.engine.protocol import RequestPhase
from components.engine.vllm.engine import VLLMEngine
from components.errors import NoRoom

_BLOCK = 32
_HOST = {
    "spec_name": "HostSpec",
    "spec_module_path": "benchmarks.migration.host",
    "cpu_bytes_to_use": 1 << 30,
    "offload_prompt_only": False,
}


class Way(StrEnum):
    """See the module docstring."""

    ROOM = "room"
    RECOMPUTE = "recompute"
    OFFLOAD = "offload"
    MIGRATE = "migrate"


class Round(msgspec.Struct):
    """All answers of one crowd."""

    way: Way
    seconds: float
    preemptions: int
    answers: list[Answer]


class _Crowd:
    """Requests that grow side by side on the first engine."""

    def __init__(self, found: list[VLLMEngine], seed: int, requests: int, prompt: int, tokens: int) -> None:
        self._here, self._others = found[0], found[1:]
        numbers = np.random.default_rng(seed)
        self._requests = [
            greedy(f"r{seed}-{n}", tuple(map(int, numbers.integers(1000, 40000, prompt))), tokens)
            for n in range(requests)
        ]
        self._leaving: set[str] = set()

    async def run(self, way: Way) -> Round:
        begun, past = time.perf_counter(), (await self._here.report())[0].preemptions_total
        watching = asyncio.ensure_future(self._watch())
        answers = await asyncio.gather(*(self._one(number) for number in range(len(self._requests))))
        watching.cancel()
        seconds, stats = time.perf_counter() - begun, (await self._here.report())[0]
        return Round(way, seconds, stats.preemptions_total - past, list(answers))

    async def _one(self, number: int) -> Answer:
        request = self._requests[number]
        answer, stream = Answer(request.request_id), self._here.generate(request)
        async for output in stream:
            answer.take(output)
            if request.request_id in self._leaving and output.finish_reason is None:
                self._leaving.clear()
                try:
                    stream = await move(self._here, self._others[0], request, answer, stream)
                except NoRoom:
                    continue
                return await answer.rest(stream)
        return answer

    async def _watch(self) -> None:
        """The youngest decoding request moves when only three free blocks are left for each."""
        while self._others:
            await asyncio.sleep(0.05)
            stats, rows = await self._here.report()
            decoding = [row for row in rows if row.phase is RequestPhase.DECODE]
            if stats.free_blocks < 3 * stats.running and len(decoding) > 1:
                self._leaving = {min(decoding, key=lambda row: row.age_s).request_id}


async def _measure(way: Way, model: str, rounds: int, requests: int, prompt: int, tokens: int) -> list[Round]:
    from vllm.config import KVTransferConfig

    needed = requests * -(-(prompt + tokens) // _BLOCK)
    blocks = 2 * needed if way is Way.ROOM else 2 * needed // 3
    more: dict[str, Any] = {"max_model_len": prompt + tokens}
    if way is Way.OFFLOAD:
        more["kv_transfer_config"] = KVTransferConfig(
            kv_connector="OffloadingConnector", kv_role="kv_both", kv_connector_extra_config=_HOST
        )
    count = 2 if way is Way.MIGRATE else 1
    async with engines(count, model=model, dtype="float32", num_gpu_blocks_override=blocks, **more) as found:
        for engine in found:
            await Answer("warm").rest(engine.generate(greedy("warm", tuple(range(500, 500 + prompt)), 20)))
        return [await _Crowd(found, seed, requests, prompt, tokens).run(way) for seed in range(rounds)]


def _row(way: Way, rounds: list[Round], right: list[Round]) -> list[str]:
    gaps = [answer.longest_gap_s() for each in rounds for answer in each.answers]
    expected = [answer.tokens for each in right for answer in each.answers]
    answers = [answer for each in rounds for answer in each.answers]
    equal = sum(answer.tokens == tokens for answer, tokens in zip(answers, expected, strict=False))
    return [
        way,
        f"{np.mean([each.seconds for each in rounds]):.1f}",
        f"{np.mean([len(a.tokens) for a in answers]) * len(answers) / sum(r.seconds for r in rounds):.0f}",
        f"{sum(each.preemptions for each in rounds)}",
        f"{sum(len(answer.moved_at) for answer in answers)}",
        f"{np.median(gaps):.2f}",
        f"{max(gaps):.2f}",
        f"{equal} of {len(answers)}" if right else "",
    ]


def main(
    model: Annotated[str, typer.Option(help="folder or name, or smollm2, tiny-llama")] = "smollm2",
    ways: Annotated[str, typer.Option(help=f"of {', '.join(Way)}")] = ",".join(Way),
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    requests: Annotated[int, typer.Option(min=2, max=8)] = 6,
    prompt: Annotated[int, typer.Option(min=32, help="tokens")] = 400,
    tokens: Annotated[int, typer.Option(min=32, help="of each answer")] = 200,
    json: Annotated[Path | None, typer.Option("--json", help="file for the raw samples")] = None,
) -> None:
    """Time and gaps of answers that do not fit into the cache together."""
    folder = models.resolve(model)
    found = {
        way: asyncio.run(_measure(way, folder, rounds, requests, prompt, tokens)) for way in map(Way, ways.split(","))
    }
    head = ["way", "seconds", "tokens/s", "preemptions", "moves", "longest gap, median, s", "max, s", "as with room"]
    rows = [_row(way, each, found.get(Way.ROOM, [])) for way, each in found.items()]
    tell(head, rows, {"model": model, "rounds": found}, json, width=160)


if __name__ == "__main__":
    program(main)
