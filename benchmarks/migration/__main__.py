# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.migration --quick --json out.json --plot out.png``"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.graph import end_on_sigterm, machine, served
from benchmarks.migration.measure import Bench
from benchmarks.migration.report import Report, plot, show
from components import models, process
from components.cli.live import join
from components.messages import Mode
from components.router.client import RouterClient
from components.transfer import Transport

_OUTPUT = 1500
"""Longest output of a request: it ends when its moves are done."""


def main(
    lengths: Annotated[str, typer.Option(help="prompt lengths in tokens")] = "256,1024,2048,4096,6144",
    moves: Annotated[int, typer.Option(help="migrations per length and mode")] = 20,
    modes: Annotated[str, typer.Option(help=f"of {', '.join(Mode)}")] = ",".join(Mode),
    model: Annotated[str, typer.Option(help="as in configs/disagg.yaml")] = "smollm2",
    transport: Annotated[Transport, typer.Option("--nixl-transport")] = Transport.AUTO,
    quick: Annotated[bool, typer.Option("--quick", help="256 and 1024 tokens, 6 migrations each")] = False,
    json: Annotated[Path | None, typer.Option("--json", help="file for the raw samples")] = None,
    picture: Annotated[Path | None, typer.Option("--plot", help="PNG or SVG file")] = None,
) -> None:
    """Downtime and added stall of live migration, stop-and-copy and token replay, in one run on one graph.

    Token replay is the algorithm of Dynamo's own request migration: the tokens go to another worker, which
    computes all KV again. Prefix caching is off, so that no mode finds the request's blocks at the target.
    """
    end_on_sigterm()
    chosen = [256, 1024] if quick else [int(word) for word in lengths.split(",")]
    count = 6 if quick else moves
    limit = max(chosen) + _OUTPUT + 8
    overrides = [f"--Common.model={model}", f"--Common.max-model-len={limit}", "--Common.enable-prefix-caching=false"]
    report = Report(machine(), model, transport.value, [], [], [])
    with served("graphs.disagg:Frontend", "configs/disagg.yaml", *overrides, f"--nixl-transport={transport}") as port:
        join()
        asyncio.run(_run(report, chosen, [Mode(word.strip()) for word in modes.split(",")], count, port))
    console = Console()
    show(report, console)
    if json is not None:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    if picture is not None:
        plot(report, picture)
    os._exit(0 if report.samples and not report.failed else 1)


async def _run(report: Report, lengths: list[int], modes: list[Mode], moves: int, port: int) -> None:
    from transformers import AutoTokenizer

    client = RouterClient(process.connect())
    await client.connect()
    bench = Bench(client, port, report.model, AutoTokenizer.from_pretrained(models.resolve(report.model)))
    with Progress() as progress:
        task = progress.add_task("migrations", total=len(lengths) * len(modes))
        for tokens in lengths:
            for mode in modes:
                progress.update(task, description=f"{tokens} tokens, {mode}")
                samples, neighbours, failed = await bench.run(tokens, mode, moves, _OUTPUT)
                report.samples += samples
                report.neighbours.append(neighbours)
                report.failed += [f"{tokens} tokens, {record.mode}: {record.reason}" for record in failed]
                progress.advance(task)
    await bench.close()


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
