# SPDX-License-Identifier: Apache-2.0
"""Two vLLM engines in one program, and one request that moves between them; what such programs have in common."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import typer
from rich.console import Console
from rich.markdown import Markdown

from benchmarks.graph import end_on_sigterm, machine
from benchmarks.migration.sampled import SampledEngine
from benchmarks.serving.parts import ENGINE
from benchmarks.serving.tables import table
from components import process
from components.engine.kv import LandingStatus, RequestId
from components.engine.protocol import GenerateOutput, GenerateRequest, Sampling
from components.engine.vllm.engine import VLLMEngine
from components.errors import RequestNotFound
from components.serve.servers import Servers


class Answer(msgspec.Struct):
    """A client's view. ``steps`` are (seconds since its begin, tokens) of each output."""

    name: str
    steps: list[tuple[float, int]] = []
    tokens: list[int] = []
    moved_at: list[int] = []
    """Tokens at each move."""
    downtimes_s: list[float] = []
    """From the last token here to the first one there, for each move."""
    bytes: list[int] = []
    """Bytes copied by each move."""
    begun: float = msgspec.field(default_factory=time.perf_counter)

    def take(self, output: GenerateOutput) -> None:
        """Add one output of the stream."""
        if output.token_ids:
            self.steps.append((time.perf_counter() - self.begun, len(output.token_ids)))
            self.tokens += output.token_ids

    async def rest(self, stream: AsyncIterator[GenerateOutput]) -> Answer:
        """Until it ends."""
        async for output in stream:
            self.take(output)
        return self

    def longest_gap_s(self) -> float:
        """Between two of its outputs."""
        times = [at for at, _ in self.steps]
        return max((b - a for a, b in zip(times, times[1:], strict=False)), default=0.0)


def greedy(name: str, prompt: tuple[int, ...], tokens: int) -> GenerateRequest:
    """A request of so many tokens."""
    return GenerateRequest(RequestId(name), prompt, Sampling(temperature=0.0, max_tokens=tokens, ignore_eos=True))


@asynccontextmanager
async def engines(
    count: int = 2, stat_loggers: Sequence[Any] = (), **arguments: Any
) -> AsyncIterator[list[VLLMEngine]]:
    """Context with small engines and their stores. ``stat_loggers``: as in ``SampledEngine.of``."""
    servers = Servers()
    agent = {"etcd_endpoints": [servers.start(os.environ)["ETCD_ENDPOINTS"]], "namespace": "benchmark"}
    args = {"max_model_len": 4096, "block_size": 32, "max_num_seqs": 8, "enforce_eager": True, "seed": 0} | arguments
    found: list[SampledEngine] = []
    try:
        for number in range(count):
            found.append(SampledEngine.of(args, agent | {"name": f"engine-{number}"}, stat_loggers))
            await found[-1].start()
        yield [*found]
    finally:
        for engine in found:
            await engine.stop()
        servers.stop()


async def move(
    here: VLLMEngine, there: VLLMEngine, request: GenerateRequest, answer: Answer, stream: AsyncIterator[GenerateOutput]
) -> AsyncIterator[GenerateOutput]:
    """One live move; returns the new stream after its first output. ``NoRoom`` changes nothing."""
    answer.moved_at.append(len(answer.tokens))
    offer = await here.offer(request.request_id)
    after = there.generate(msgspec.structs.replace(request, output_token_ids=tuple(answer.tokens), landing=offer))
    first = asyncio.ensure_future(anext(after))
    try:
        await _landed(there, request.request_id)
        frozen = await here.freeze(request.request_id)
        await there.commit(request.request_id, frozen)
    except BaseException:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await here.resume(request.request_id)
        answer.moved_at.pop()
        raise
    while len(answer.tokens) < len(frozen.output_token_ids):
        answer.take(await anext(stream))
    last = answer.steps[-1][0] if answer.steps else 0.0
    answer.take(await first)
    answer.downtimes_s.append(answer.steps[-1][0] - last)
    await here.release(request.request_id)
    async for _ in stream:
        continue
    with suppress(RequestNotFound):
        answer.bytes.append((await there.landing_status(request.request_id)).bytes)
    return after


async def _landed(engine: VLLMEngine, name: RequestId) -> LandingStatus:
    while True:
        with suppress(RequestNotFound):  # It is there with the first pull of its stream.
            if (status := await engine.landing_status(name)).landed:
                return status
        await asyncio.sleep(0.005)


async def to_and_fro(
    here: VLLMEngine, there: VLLMEngine, request: GenerateRequest, answer: Answer, moves: int
) -> Answer:
    """An answer with ``moves`` moves at equal distances."""
    every = (request.sampling.max_tokens or 0) // (moves + 1)
    stream = here.generate(request)
    for number in range(1, moves + 1):
        async for output in stream:
            answer.take(output)
            if len(answer.tokens) >= number * every:
                break
        stream = await move(here, there, request, answer, stream)
        here, there = there, here
    return await answer.rest(stream)


def tell(
    head: list[str], rows: list[list[str]], facts: dict[str, Any], json: Path | None, width: int | None = None
) -> None:
    """Print a table, and write what was measured, if asked for."""
    Console(width=width).print(Markdown("\n".join(table(head, rows))))
    if json is not None:
        json.write_bytes(msgspec.json.format(msgspec.json.encode({"machine": machine()} | facts)))


def program(main: Callable[..., None]) -> None:
    """Run a benchmark's command."""
    end_on_sigterm()
    os.environ.update({name: os.environ.get(name, value) for name, value in ENGINE.items()})
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    process.run_blocking(app)
