# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.policy.live``: one hot decode worker out of two, with and without the planner's plugin.

Real engines, the same requests, placed in turn (round robin) by Dynamo's frontend. Every other request is long, so that
all long ones land on one worker, whose KV cannot hold them: it preempts, and what arrives there waits. The only
difference between the two systems is Dynamo's planner with the plugin. Temperature is 0 and texts are compared.
Ends with ``MigrateError`` when a system does not start or no decision is seen; a failed request is a sample.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import openai
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.graph import end_on_sigterm, machine
from benchmarks.serving.load import Control
from benchmarks.serving.parts import Kind
from benchmarks.serving.systems import System, running
from components.errors import MigrateError
from components.migration.messages import MoveRecord
from components.transfer import Transport

_WORDS = "Once upon a time, in a small house by the sea, there lived an old clock maker. "
_FIRST_DECISION_S = 90.0
_BLOCK = 32


class Shape(msgspec.Struct, frozen=True):
    """The load: requests in even gaps, long and short in turn."""

    requests: int
    gap_s: float
    long_tokens: int
    short_tokens: int
    repeats: int
    blocks: int
    """KV blocks of 32 tokens for each decode worker."""


class Answer(msgspec.Struct, frozen=True):
    """One request as its client saw it."""

    long: bool
    start_s: float
    """Since the first one was sent."""
    prompt_tokens: int
    ttft_s: float
    itls_s: tuple[float, ...]
    text: str
    error: str = ""


class Live(msgspec.Struct):
    """All repeats of one system."""

    system: str
    answers: list[list[Answer]]
    preemptions: dict[str, int]
    """By decode worker."""
    moves: list[MoveRecord]

    def ttft_ms(self, percent: float) -> float:
        """Of all requests that were answered."""
        return 1e3 * float(np.percentile([a.ttft_s for a in self.all() if not a.error], percent))

    def itl_ms(self, percent: float) -> float:
        """Of all gaps between the tokens of all requests."""
        return 1e3 * float(np.percentile([gap for a in self.all() for gap in a.itls_s], percent))

    def stall_ms(self, percent: float) -> float:
        """Of the longest gap of each request."""
        return 1e3 * float(np.percentile([max(a.itls_s, default=0.0) for a in self.all()], percent))

    def all(self) -> list[Answer]:
        """Answers of all repeats."""
        return [answer for repeat in self.answers for answer in repeat]


class Output(msgspec.Struct):
    """Everything that was measured."""

    machine: dict[str, str]
    model: str
    engine: str
    prefill_worker: bool
    shape: Shape
    systems: list[Live]
    changed_texts: int


class _Client:
    """Sends the requests of one repeat."""

    def __init__(self, client: openai.AsyncOpenAI, model: str, shape: Shape, repeat: int) -> None:
        self._client = client
        self._model = model
        self._shape = shape
        self._repeat = repeat
        self._began = time.monotonic()

    async def load(self) -> list[Answer]:
        """All of them, in even gaps."""
        tasks = []
        for number in range(self._shape.requests):
            tasks.append(asyncio.create_task(self._ask(number)))
            await asyncio.sleep(self._shape.gap_s)
        return list(await asyncio.gather(*tasks))

    async def _ask(self, number: int) -> Answer:
        sent, is_long = time.monotonic(), number % 2 == 0
        times, parts, prompt_tokens, error = [], [], 0, ""
        try:
            stream = await self._client.completions.create(
                model=self._model,
                # Words of its own at the beginning: no prefix cache helps.
                prompt=f"{self._repeat}.{number} " + _WORDS * (8 if is_long else 2),
                max_tokens=self._shape.long_tokens if is_long else self._shape.short_tokens,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            async for chunk in stream:
                prompt_tokens = chunk.usage.prompt_tokens if chunk.usage else prompt_tokens
                if chunk.choices and chunk.choices[0].text:
                    times.append(time.monotonic())
                    parts.append(chunk.choices[0].text)
        except openai.OpenAIError as failure:
            error = repr(failure)
        first = times[0] - sent if times else 0.0
        gaps = tuple(round(b - a, 6) for a, b in itertools.pairwise(times))
        text = "".join(parts)
        return Answer(
            is_long, sent - self._began, prompt_tokens, first, gaps, text, error or ("" if times else "silent")
        )


async def _load(url: str, model: str, shape: Shape, repeat: int) -> list[Answer]:
    own = openai.DefaultAsyncHttpxClient(trust_env=False)
    known: dict[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": 240, "http_client": own}
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", **known) as client:
        return await _Client(client, model, shape, repeat).load()


def _wait_for_decisions(control: Control) -> None:
    end = time.monotonic() + _FIRST_DECISION_S
    while not control.status().decisions:
        if time.monotonic() > end:
            raise MigrateError(f"the planner has not decided anything in {_FIRST_DECISION_S:g} s")
        time.sleep(0.5)


def _run(system: System, shape: Shape) -> Live:
    with Control(system) as control:
        if system.kind is Kind.PLANNER:
            _wait_for_decisions(control)
        asyncio.run(_load(system.url, system.model, msgspec.structs.replace(shape, requests=2), 999))  # Warm-up.
        before = _preemptions(control)
        answers = [asyncio.run(_load(system.url, system.model, shape, repeat)) for repeat in range(shape.repeats)]
        return Live(
            "plugin" if system.kind is Kind.PLANNER else "without",
            answers,
            {worker: count - before[worker] for worker, count in _preemptions(control).items()},
            list(control.status().moves),
        )


def _preemptions(control: Control) -> dict[str, int]:
    time.sleep(1.5)  # What workers tell is up to a second old.
    decode = [w for w in control.status().workers if w.role in ("decode", "agg")]
    return {w.worker: w.stats.preemptions_total for w in decode if w.stats}


def changed(systems: list[Live]) -> int:
    """Texts that differ between the systems, errors included."""
    first, *rest = systems
    return sum(
        bool(a.error or b.error) or a.text != b.text
        for other in rest
        for a, b in zip(first.all(), other.all(), strict=True)
    )


def offered(output: Output) -> float:
    """KV that the long requests would hold at once if none had to wait, as a share of the hot worker's."""
    shape, base = output.shape, output.systems[0]
    prompt = float(np.mean([a.prompt_tokens for a in base.all() if a.long]))
    lasts_s = shape.long_tokens * base.itl_ms(50) / 1e3
    return lasts_s / (2 * shape.gap_s) * (prompt + shape.long_tokens / 2) / (_BLOCK * shape.blocks)


def show(output: Output, console: Console) -> None:
    """Ratios first."""
    table = Table(title="one hot decode worker out of two, round robin")
    for column in ("system", "P99 TTFT lower by", "TTFT p50", "p99", "P99 ITL lower by", "ITL p50", "p99"):
        table.add_column(column, justify="left" if column == "system" else "right")
    for column in ("longest gap p50", "p99", "preempted, hot", "other", "moved", "downtime", "failed"):
        table.add_column(column, justify="right")
    base = output.systems[0]
    for live in output.systems:
        counts = sorted(live.preemptions.values(), reverse=True)
        done = [move.downtime_s for move in live.moves if move.ok]
        table.add_row(
            live.system,
            f"{base.ttft_ms(99) / live.ttft_ms(99):.2f}x",
            *(f"{live.ttft_ms(p):.0f}" for p in (50, 99)),
            f"{base.itl_ms(99) / live.itl_ms(99):.2f}x",
            *(f"{live.itl_ms(p):.1f}" for p in (50, 99)),
            *(f"{live.stall_ms(p):.0f}" for p in (50, 99)),
            *(str(count) for count in counts[:2]),
            f"{len(done)} (+{len(live.moves) - len(done)} not)",
            f"{1e3 * float(np.median(done)):.0f}" if done else "",
            str(sum(bool(a.error) for a in live.all())),
        )
    console.print(table)
    console.print(f"times in ms; texts that differ between the systems: {output.changed_texts}")
    console.print(f"the long requests would fill {offered(output):.2f} times the KV of their worker")


def main(
    engine: Annotated[str, typer.Option(help="vllm, or paged: KV blocks and no model")] = "vllm",
    model: Annotated[str, typer.Option(help="as in configs/disagg.yaml")] = "tiny-llama",
    requests: Annotated[int, typer.Option(help="of each repeat")] = 80,
    gap: Annotated[float, typer.Option(help="seconds between two requests")] = 0.25,
    long_tokens: Annotated[int, typer.Option(help="output of every other request")] = 500,
    short_tokens: Annotated[int, typer.Option(help="output of the others")] = 48,
    dtype: Annotated[str, typer.Option(help="in bfloat16 a text depends on what else is in the batch")] = "float32",
    blocks: Annotated[int, typer.Option(help="KV blocks of 32 tokens for each decode worker")] = 96,
    repeats: Annotated[int, typer.Option(help="times the load is run on each system")] = 2,
    json: Annotated[Path | None, typer.Option("--json", help="file for all samples")] = None,
    logs: Annotated[Path | None, typer.Option(help="folder for the output of all processes")] = None,
) -> None:
    """Preemptions, P99 TTFT and P99 ITL of a skewed load with and without the planner's plugin."""
    shape = Shape(requests, gap, long_tokens, short_tokens, repeats, blocks)
    limit = f"num_blocks: {blocks}, step_s: 0.01" if engine == "paged" else f"num_gpu_blocks_override: {blocks}"
    both = (
        f"--Common.engine={engine}",
        f"--Common.dtype={dtype}",
        f"--Common.max-model-len={min(4096, _BLOCK * blocks)}",
        f"--DecodeWorker.engine-args={{{limit}}}",
        "--Frontend.router-mode=round-robin",
    )
    planner = ("--Planner.policy-file=benchmarks/policy/live.yaml", "--Planner.interval-s=1")
    output = Output(machine(), model, engine, True, shape, [], 0)
    for kind, more in ((Kind.OURS, ()), (Kind.PLANNER, planner)):
        with running(kind, model, Transport.AUTO, logs, both + more) as system:
            output.systems.append(_run(system, shape))
    output.changed_texts = changed(output.systems)
    if json is not None:
        json.write_bytes(msgspec.json.encode(output))
    show(output, Console(width=160))


if __name__ == "__main__":
    end_on_sigterm()
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
