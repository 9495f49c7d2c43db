# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.migration.crowd``: all requests of a worker move to another one at once, to and fro.

One of two workers is drained while it decodes many requests; then it is undrained, and the other one is drained. Each
drain is a sample: the time from the first to the last hand-over, the longest wait of each client for a token, the
number of preemptions at the destination. Nothing else runs. Prefix caching is off.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from pathlib import Path
from typing import Annotated

import aiohttp
import msgspec
import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoTokenizer

from benchmarks.graph import end_on_sigterm, machine, place, served
from benchmarks.migration.drain import Stream, start
from benchmarks.migration.measure import Prompts
from benchmarks.migration.timeline import read
from components import models, process
from components.client import Workers
from components.errors import MigrateError
from components.serve.state import join

_FEW = 8
"""Tokens that each request has before the first drain."""
_REST_S = 1.5
"""Between two drains."""
_CUT = "handed over"


class Sample(msgspec.Struct, frozen=True):
    """One drain. Times in seconds."""

    requests: int
    """Running when it began."""
    moved: int
    failed: tuple[str, ...]
    """Reasons of attempts that did not succeed."""
    spread_s: float
    """From the first to the last hand-over."""
    total_s: float
    """From the call to its answer."""
    bytes: int
    lanes: tuple[str, ...]
    gaps_s: tuple[float, ...]
    """Longest gap between two tokens of each client, from the call until ``_REST_S`` after its answer."""
    before_s: float
    """Median gap of all clients before the call."""
    preemptions: int
    """Of both workers, while it went on."""


class Crowd(msgspec.Struct):
    """Everything that was measured."""

    machine: dict[str, str]
    model: str
    prompt: int
    samples: list[Sample]
    ended: int = 0
    """Clients with an error before the end of the last drain."""


async def _preemptions(client: Workers) -> int:
    await client.refresh()
    return sum(worker.stats.preemptions_total for worker in client.status().workers if worker.stats is not None)


async def _fill(
    client: Workers, http: aiohttp.ClientSession, prompts: Prompts, count: int, size: tuple[int, int]
) -> list[Stream]:
    """Start all requests on the first worker, with the other one cordoned."""
    other = client.status().workers[1].worker
    await client.drain(other)
    streams = await start(http, [prompts.body(*size) for _ in range(count)])
    while not all(len(s.times) >= _FEW for s in streams):
        if any(s.task is not None and s.task.done() for s in streams):
            raise MigrateError("a request ended before the first drain")
        await asyncio.sleep(0.1)
    await client.undrain(other)
    await asyncio.sleep(2 * _REST_S)
    return streams


async def _drain(client: Workers, source: str, streams: list[Stream], folder: Path) -> Sample:
    running = sum(s.task is not None and not s.task.done() for s in streams)
    preempted, began, at = await _preemptions(client), time.time(), time.monotonic()
    drained = await client.drain(source)
    ended = time.time()
    await asyncio.sleep(_REST_S)
    await client.undrain(source)
    cuts = [mark.at for mark in read(folder) if mark.what == _CUT and mark.at >= at]
    window = [(began, ended + _REST_S)]
    return Sample(
        requests=running,
        moved=sum(record.ok for record in drained.moves),
        failed=tuple(record.reason for record in drained.moves if not record.ok),
        spread_s=max(cuts, default=0.0) - min(cuts, default=0.0),
        total_s=ended - began,
        bytes=sum(record.bytes for record in drained.moves),
        lanes=tuple({record.lane for record in drained.moves if record.ok}),
        gaps_s=tuple(max(s.gaps(window), default=0.0) for s in streams),
        before_s=float(np.median([gap for s in streams for gap in s.gaps([(began - _REST_S, began)])])),
        # vLLM counts each arrival as one preemption.
        preemptions=await _preemptions(client) - preempted - sum(record.ok for record in drained.moves),
    )


async def _run(crowd: Crowd, port: int, prompts: Prompts, count: int, drains: int, output: int, folder: Path) -> None:
    client = await Workers.connect(process.connect(), process.namespace(), 60.0)
    await client.refresh()
    names = [worker.worker for worker in client.status().workers]
    timeout, connector = aiohttp.ClientTimeout(total=600), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", timeout=timeout, connector=connector) as http:
        streams = await _fill(client, http, prompts, count, (crowd.prompt, output))
        for number in track(range(drains), description="drains"):
            crowd.samples.append(await _drain(client, names[number % 2], streams, folder))
        crowd.ended = sum(s.task is not None and s.task.done() and not s.ended for s in streams)
        for stream in streams:
            if stream.task is not None:
                stream.task.cancel()
        await asyncio.gather(*(s.task for s in streams if s.task is not None), return_exceptions=True)
    client.close()


def show(crowd: Crowd, console: Console) -> None:
    """One line for each drain."""
    table = Table(title=f"{crowd.model}, prompts of {crowd.prompt} tokens, {place(crowd.machine)}")
    for column in ("moved", "commits s", "total s", "GB", "gap p50", "p99", "max", "before", "preempted"):
        table.add_column(column, justify="right")
    for one in crowd.samples:
        gaps = [1e3 * gap for gap in one.gaps_s]
        table.add_row(
            f"{one.moved} of {one.requests}",
            f"{one.spread_s:.2f}",
            f"{one.total_s:.2f}",
            f"{one.bytes / 1e9:.1f}",
            *(f"{value:.0f}" for value in (*np.percentile(gaps, (50, 99)), max(gaps), 1e3 * one.before_s)),
            str(one.preemptions),
        )
    console.print(table)
    console.print(
        "commits: from the first to the last; gap: the longest wait of each client for a token around the drain, ms; "
        "before: the median, undisturbed; preempted: at the destination"
    )
    for reason in sorted({reason for one in crowd.samples for reason in one.failed}):
        console.print(f"not moved at the first attempt: {reason}")


def main(
    config: Annotated[Path, typer.Option("--config", help="of graphs.agg:Frontend with two workers")],
    model: Annotated[str, typer.Option(help="as in configs/agg.yaml")] = "smollm2",
    requests: Annotated[int, typer.Option(help="that move together")] = 16,
    prompt: Annotated[int, typer.Option(help="tokens of each")] = 256,
    drains: Annotated[int, typer.Option(help="samples")] = 6,
    output: Annotated[int, typer.Option(help="tokens of each answer")] = 3000,
    json: Annotated[Path | None, typer.Option("--json", help="file for the raw samples")] = None,
) -> None:
    """Moves all requests of a worker at once."""
    end_on_sigterm()
    crowd = Crowd(machine(), model, prompt, [])
    prompts = Prompts(model, AutoTokenizer.from_pretrained(models.resolve(model)))
    overrides = {
        "model": model,
        "max-model-len": prompt + output + 8,
        "max-num-seqs": requests + 8,
        "enable-prefix-caching": "false",
    }
    with tempfile.TemporaryDirectory(prefix="marks-") as folder:
        os.environ["DYN_MIGRATE_TIMELINE"] = folder
        with served("graphs.agg:Frontend", str(config), *(f"--Common.{k}={v}" for k, v in overrides.items())) as port:
            join()
            asyncio.run(_run(crowd, port, prompts, requests, drains, output, Path(folder)))
    if json is not None:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(crowd)))
    show(crowd, Console())
    os._exit(0 if crowd.samples and not crowd.ended else 1)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
