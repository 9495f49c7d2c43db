# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.migration --quick --json out.json --plot out.png``"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.graph import arguments_of, end_on_sigterm, machine, served
from benchmarks.migration.measure import Bench, Prompts
from benchmarks.migration.report import MODES, Report, plot, show
from benchmarks.migration.stock import DYNAMO, measure
from components import models, process
from components.client import Workers
from components.migration.messages import Mode
from components.serve import precision
from components.serve.state import join
from components.transfer import Transport

_OUTPUT = 500
"""Fewest further tokens of a moved request; the benchmark ends it after its moves."""
_TOKENS = 200
"""Further tokens for each move: steps of 5 ms for 1 s."""
_GRAPH = "graphs.disagg:Frontend"
_CONFIG = Path("configs/disagg.yaml")
_REPLAYS = 5
"""Samples of token replay for each length: with 7,680 tokens one takes 45 s here."""
_PATIENCE_S = 120
"""Time-out of a migration's steps and of silent workers: a replay of 7,680 tokens exceeds the defaults.

A step may take a third of the lease.
"""
_STOCK_MOVES = 3
"""Samples of Dynamo's own migration for each length; each kills a worker, which takes 30 s to start."""


def main(
    lengths: Annotated[str, typer.Option(help="prompt lengths in tokens")] = "256,1024,2048,4096,7680",
    moves: Annotated[int, typer.Option(help="migrations per length and mode")] = 20,
    modes: Annotated[str, typer.Option(help=f"of {', '.join(MODES)}")] = ",".join(MODES),
    model: Annotated[str, typer.Option(help="as in configs/disagg.yaml")] = "smollm2",
    graph: Annotated[str, typer.Option(help="graphs.disagg:Frontend or graphs.agg:Frontend")] = _GRAPH,
    config: Annotated[Path, typer.Option("--config", help="of the graph, for GPUs say")] = _CONFIG,
    dtype: Annotated[str, typer.Option(help="as in configs/disagg.yaml")] = "auto",
    transport: Annotated[Transport, typer.Option("--nixl-transport")] = Transport.AUTO,
    quick: Annotated[bool, typer.Option("--quick", help="256 and 1024 tokens, 6 migrations each")] = False,
    alone: Annotated[bool, typer.Option("--alone", help="the moved request has no neighbours")] = False,
    devices: Annotated[str, typer.Option(help="dynamo: GPUs that workers take in turn; empty: CPU")] = "",
    engine_args: Annotated[str, typer.Option(help="dynamo: vLLM's arguments for all workers, as JSON")] = "{}",
    json: Annotated[Path | None, typer.Option("--json", help="file for the raw samples")] = None,
    picture: Annotated[Path | None, typer.Option("--plot", help="PNG or SVG file")] = None,
) -> None:
    """Downtime and added stall of live migration, stop-and-copy and token replay, and of stock Dynamo's migration.

    Stock Dynamo moves the requests of a lost worker by token replay; mode "dynamo" starts it after this package's
    graph has ended and kills workers. Prefix caching is off, so that no mode finds the request's blocks at the target.
    """
    end_on_sigterm()
    words = [word.strip() for word in modes.split(",")]
    if unknown := [word for word in words if word not in MODES]:
        raise typer.BadParameter(f"unknown mode {unknown[0]!r}: use {', '.join(MODES)}", param_hint="--modes")
    ours = [Mode(word) for word in words if word != DYNAMO]
    for path in (json, picture):
        if path is not None and not path.parent.is_dir():
            raise typer.BadParameter(f"no folder {path.parent}: make it first", param_hint=str(path))
    chosen = [256, 1024] if quick else [int(word) for word in lengths.split(",")]
    count = 6 if quick else moves
    limit = min(max(chosen) + _OUTPUT + count * _TOKENS + 8, _longest(model))
    if max(chosen) + _OUTPUT > limit:
        raise typer.BadParameter(
            f"{model} takes {limit} tokens: --lengths up to {limit - _OUTPUT}", param_hint="--lengths"
        )
    overrides = [f"--Common.model={model}", f"--Common.max-model-len={limit}", "--Common.enable-prefix-caching=false"]
    dtype = precision.on_cpu(dtype)
    overrides.append(f"--Common.dtype={dtype}")
    overrides.append(f"--Common.lease-s={4 * _PATIENCE_S}")
    report = Report(machine(), model, transport.value, [], [], [], dtype)
    prompts = _prompts(model)
    with Progress() as progress:
        task = progress.add_task("migrations", total=len(chosen) * len(words))

        def row_done() -> None:
            # The whole run takes an hour: keep the results of a run that is ended early.
            progress.advance(task)
            if json is not None:
                json.write_bytes(msgspec.json.format(msgspec.json.encode(report)))

        if ours:
            with served(graph, str(config), *overrides, f"--nixl-transport={transport}") as port:
                join()
                asyncio.run(_run(report, chosen, ours, count, port, prompts, limit, alone, progress, row_done))
        if DYNAMO in words:
            progress.update(task, description=DYNAMO)
            engine = {"dtype": dtype, "max-model-len": limit, "enable-prefix-caching": False}
            engine |= arguments_of(engine_args)
            gpus = tuple(int(word) for word in devices.split(",") if word)
            for samples, failed in measure(chosen, min(count, _STOCK_MOVES), model, prompts, engine, gpus):
                report.samples += samples
                report.failed += failed
                row_done()
    console = Console()
    show(report, console)
    if picture is not None:
        plot(report, picture)
    os._exit(0 if report.samples and not report.failed else 1)


def _longest(model: str) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(models.resolve(model)).max_position_embeddings)


def _prompts(model: str) -> Prompts:
    from transformers import AutoTokenizer

    return Prompts(model, AutoTokenizer.from_pretrained(models.resolve(model)))


async def _run(
    report: Report,
    lengths: list[int],
    modes: list[Mode],
    moves: int,
    port: int,
    prompts: Prompts,
    context: int,
    alone: bool,
    progress: Progress,
    row_done: Callable[[], None],
) -> None:
    client = await Workers.connect(process.connect(), process.namespace(), 60.0)
    bench = Bench(client, port, prompts, context, alone)
    [task] = progress.task_ids
    for tokens in lengths:
        for mode in modes:
            progress.update(task, description=f"{tokens} tokens, {mode}")
            samples, neighbours, failed = await bench.run(
                tokens, mode, min(moves, _REPLAYS) if mode is Mode.REPLAY else moves
            )
            report.samples += samples
            report.neighbours += [] if alone else [neighbours]
            report.failed += [f"{tokens} tokens, {record.mode}: {record.reason}" for record in failed]
            row_done()
    await bench.close()


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
