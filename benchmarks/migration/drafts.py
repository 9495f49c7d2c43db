# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding before, during and after moves: ``python -m benchmarks.migration.drafts --json out.json``.

Two engines in one program, one greedy request: on one engine to its end, then moved to and fro live, then again on one
engine. Tokens of an output are those of a step, so (mean - 1) / drafts is the share of drafts that were accepted.
"""

from __future__ import annotations

import asyncio
import json as jsonlib
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import typer
from rich.console import Console
from rich.markdown import Markdown

from benchmarks.graph import end_on_sigterm, machine
from benchmarks.serving.parts import ENGINE
from benchmarks.serving.tables import table
from components import models, process
from components.engine.protocol import GenerateOutput, GenerateRequest, RequestId, Sampling
from components.engine.vllm import VLLMEngine
from components.engine.vllm.start import VLLMOptions
from components.errors import MigrateError, RequestNotFound
from components.serve.servers import Servers

_PROMPT = 300
_NGRAM = '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 2, "prompt_lookup_max": 4}'


class Phase(msgspec.Struct):
    """One answer. ``steps`` are (seconds since its begin, tokens) of each output."""

    name: str
    steps: list[tuple[float, int]] = []
    tokens: list[int] = []
    moved_at: list[int] = []
    """Tokens that there were at each move."""

    def take(self, output: GenerateOutput, begun: float) -> None:
        """One output of the stream."""
        if output.token_ids:
            self.steps.append((time.perf_counter() - begun, len(output.token_ids)))
            self.tokens += output.token_ids

    def row(self, drafts: int) -> list[str]:
        """Accepted share, tokens for each step and second."""
        each = np.array([tokens for _, tokens in self.steps[1:]])
        seconds = self.steps[-1][0] - self.steps[0][0]
        rate = float(each.sum()) / seconds
        accepted = (float(each.mean()) - 1) / drafts
        return [self.name, str(len(self.moved_at)), f"{accepted:.2f}", f"{each.mean():.2f}", f"{rate:.0f}"]


async def _plain(engine: VLLMEngine, request: GenerateRequest, phase: Phase) -> Phase:
    begun = time.perf_counter()
    async for output in engine.generate(request):
        phase.take(output, begun)
    return phase


async def _moved(here: VLLMEngine, there: VLLMEngine, request: GenerateRequest, phase: Phase, moves: int) -> Phase:
    begun, every = time.perf_counter(), request.sampling.max_tokens // (moves + 1)
    stream = here.generate(request)
    for number in range(1, moves + 1):
        async for output in stream:
            phase.take(output, begun)
            if len(phase.tokens) >= number * every:
                break
        phase.moved_at.append(len(phase.tokens))
        offer = await here.offer(request.request_id)
        landing = msgspec.structs.replace(request, output_token_ids=tuple(phase.tokens), landing=offer)
        after = there.generate(landing)
        first = asyncio.ensure_future(anext(after))
        await _landed(there, request.request_id)
        frozen = await here.freeze(request.request_id)
        await there.commit(request.request_id, frozen)
        while len(phase.tokens) < len(frozen.output_token_ids):
            phase.take(await anext(stream), begun)
        await here.release(request.request_id)
        async for _ in stream:
            continue
        phase.take(await first, begun)
        stream, here, there = after, there, here
    async for output in stream:
        phase.take(output, begun)
    return phase


async def _landed(engine: VLLMEngine, name: RequestId) -> None:
    while True:
        with suppress(RequestNotFound):  # It is there with the first pull of its stream.
            if (await engine.landing_status(name)).landed:
                return
        await asyncio.sleep(0.005)


async def _measure(model: str, drafts: dict[str, Any], tokens: int, moves: int) -> list[Phase]:
    servers = Servers()
    agent = {"etcd_endpoints": [servers.start(os.environ)["ETCD_ENDPOINTS"]], "namespace": "drafts"}
    args = {"model": model, "max_model_len": 4096, "block_size": 32, "max_num_seqs": 4, "enforce_eager": True}
    args |= {"num_gpu_blocks_override": 300, "speculative_config": drafts}
    a, b = (VLLMEngine(VLLMOptions(args, agent | {"name": name})) for name in ("a", "b"))
    sampling = Sampling(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    prompt = tuple(1000 + number % 97 for number in range(_PROMPT))
    request = GenerateRequest(RequestId("before"), prompt, sampling)
    try:
        await a.start()
        await b.start()
        await _plain(a, msgspec.structs.replace(request, request_id=RequestId("warm-a")), Phase("warm"))
        await _plain(b, msgspec.structs.replace(request, request_id=RequestId("warm-b")), Phase("warm"))
        before = await _plain(a, request, Phase("before"))
        moved = msgspec.structs.replace(request, request_id=RequestId("moved"))
        during = await _moved(a, b, moved, Phase("moved"), moves)
        after = await _plain(a, msgspec.structs.replace(request, request_id=RequestId("after")), Phase("after"))
        if not before.tokens == during.tokens == after.tokens:
            raise MigrateError("the moved request gave other tokens")
        return [before, during, after]
    finally:
        await a.stop()
        await b.stop()
        servers.stop()


def main(
    model: Annotated[str, typer.Option(help="folder or name, or smollm2, tiny-llama")] = "smollm2",
    drafts: Annotated[str, typer.Option(help="vLLM's speculative-config, JSON")] = _NGRAM,
    tokens: Annotated[int, typer.Option(min=100, help="of each answer")] = 1000,
    moves: Annotated[int, typer.Option(min=1, help="of the answer that moves")] = 20,
    json: Annotated[Path | None, typer.Option("--json", help="file for the raw samples")] = None,
) -> None:
    """Share of drafts accepted and tokens per second of one request before, during and after moves."""
    os.environ.update({name: os.environ.get(name, value) for name, value in ENGINE.items()})
    config = jsonlib.loads(drafts)
    phases = asyncio.run(_measure(models.resolve(model), config, tokens, moves))
    head = ["answer", "moves", "drafts accepted", "tokens/step", "tokens/s"]
    lines = table(head, [phase.row(config["num_speculative_tokens"]) for phase in phases])
    Console().print(Markdown("\n".join(lines)))
    if json is not None:
        report = {"machine": machine(), "model": model, "drafts": config, "phases": phases}
        json.write_bytes(msgspec.json.format(msgspec.json.encode(report)))


if __name__ == "__main__":
    end_on_sigterm()
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    process.run_blocking(app)
