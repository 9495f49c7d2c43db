# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.policy.live``: real engines under Dynamo's KV routing, with and without the planner's plugin.

Two aggregated workers get conversations with long answers (``turns.py``), of whose KV they hold only a part. The
planner's process is started and stopped between the runs: nothing else differs, and the workers are the same. Ends with
``MigrateError`` when the system does not start or no decision is seen; a failed request is a sample.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.graph import arguments_of, end_on_sigterm, machine
from benchmarks.policy.turns import Answer, Shape, gaps, send, sessions
from benchmarks.serving.load import Control
from benchmarks.serving.parts import Kind, Part, Size
from benchmarks.serving.shapes import SHAPES
from benchmarks.serving.systems import System, running
from components.errors import MigrateError
from components.migration.messages import MoveRecord
from components.transfer import Transport
from planner_hooks.simulate.model import Slo

_FIRST_DECISION_S = 90.0
_SETTLE_S = 1.5
"""What workers tell is up to a second old."""
_STOP_S = 10.0


class Run(msgspec.Struct):
    """One load on one of both systems."""

    plugin: bool
    repeat: int
    answers: list[Answer]
    preemptions: int
    moves: list[MoveRecord]


class Output(msgspec.Struct):
    """Everything that was measured."""

    machine: dict[str, str]
    model: str
    date: str
    engine: dict[str, Any]
    policy: str
    shape: Shape
    slo: Slo
    runs: list[Run] = []


def _planner(system: System) -> Part:
    return next(part for part in system.parts if part.name.startswith("Planner"))


def _wait_for_decisions(system: System, control: Control) -> None:
    end, planner = time.monotonic() + _FIRST_DECISION_S, _planner(system)
    while not control.status().decisions:
        if planner.process is None or planner.process.poll() is not None:
            raise MigrateError(f"the planner has ended:\n{system.log(planner).read_text(errors='replace')[-2000:]}")
        if time.monotonic() > end:
            raise MigrateError(f"the planner has not decided anything in {_FIRST_DECISION_S:g} s")
        time.sleep(0.5)


def _preemptions(control: Control) -> int:
    time.sleep(_SETTLE_S)
    workers = control.status().workers
    return sum(worker.stats.preemptions_total for worker in workers if worker.stats is not None)


def _run(system: System, control: Control, shape: Shape, plugin: bool, repeat: int) -> Run:
    if plugin:
        system.start(_planner(system))
        _wait_for_decisions(system, control)
    before, began = _preemptions(control), time.monotonic()
    answers = asyncio.run(send(system.url, system.model, sessions(shape, repeat, "b" if plugin else "a")))
    after, took = _preemptions(control), time.monotonic() - began
    moves = [move for move in control.status().moves if move.age_s < took]
    if plugin:
        system.terminate(_planner(system), _STOP_S)
    # vLLM counts each arrival of a moved request as a preemption.
    return Run(plugin, repeat, answers, after - before - sum(move.ok for move in moves), moves)


def measure(output: Output, system: System, repeats: int, until: float, console: Console) -> None:
    """Both systems in turn, the first one alternating; no run begins that would end after ``until``."""
    with Control(system) as control:
        # One that cannot decide ends here, and not after the first run.
        _wait_for_decisions(system, control)
        system.terminate(_planner(system), _STOP_S)
        warm = msgspec.structs.replace(output.shape, sessions=4, seconds=1.0, turns=1, longest=64)
        asyncio.run(send(system.url, system.model, sessions(warm, -1, "w")))
        took = 0.0
        for repeat in range(repeats):
            for plugin in (False, True) if repeat % 2 == 0 else (True, False):
                began = time.monotonic()
                if began + took > until:
                    return
                run = _run(system, control, output.shape, plugin, repeat)
                output.runs.append(run)
                took = time.monotonic() - began
                errors = [a.error for a in run.answers if a.error]
                console.print(
                    f"{'plugin' if plugin else 'without'}, {repeat}: {len(run.answers)} turns in {took:.0f} s, "
                    f"{run.preemptions} preempted, {len(run.moves)} moves, {len(errors)} errors {errors[:1]}"
                )


def figures(runs: list[Run], slo: Slo) -> dict[str, float]:
    """Of all runs of one system, times in milliseconds."""
    answers = [answer for run in runs for answer in run.answers]
    whole = [answer for answer in answers if not answer.error]
    good = [a for a in whole if a.ttft_s <= slo.ttft_s and a.tpot_s <= slo.tpot_s]
    columns = {
        "TTFT": [a.ttft_s for a in whole],
        "ITL": list(gaps(whole)),
        "TPOT": [a.tpot_s for a in whole if a.tokens > 1],
        "longest gap": [max(a.gaps_s, default=0.0) for a in whole],
    }
    found = {
        f"{name} p{p}": 1e3 * float(np.percentile(values, p)) if values else 0.0
        for name, values in columns.items()
        for p in (50, 99)
    }
    later = [a for a in whole if a.turn]
    found["cached"] = sum(a.cached_tokens for a in later) / max(1, sum(a.prompt_tokens for a in later))
    found["goodput"] = len(good) / max(1, len(answers))
    found["preempted"] = sum(run.preemptions for run in runs)
    found["moved"] = sum(move.ok for run in runs for move in run.moves)
    found["failed"] = len(answers) - len(whole)
    return found


def show(output: Output, console: Console) -> None:
    """Both systems beside each other."""
    both = [figures([run for run in output.runs if run.plugin == plugin], output.slo) for plugin in (False, True)]
    table = Table(title="two workers, Dynamo's KV routing")
    for column in ("ms", "without", "with the plugin", "lower by"):
        table.add_column(column, justify="left" if column == "ms" else "right")
    for name, without in both[0].items():
        with_plugin = both[1][name]
        digits = 3 if name in ("cached", "goodput") else 1
        ratio = f"{without / with_plugin:.2f}x" if with_plugin and digits == 1 else ""
        table.add_row(name, f"{without:,.{digits}f}", f"{with_plugin:,.{digits}f}", ratio)
    console.print(table)
    console.print("cached: share of the prompt tokens of later turns; preempted, moved, failed: numbers")


def main(
    model: Annotated[str, typer.Option(help="as in configs/agg.yaml, a folder, or llama-3.1-8b")] = "tiny-llama",
    devices: Annotated[str, typer.Option(help="GPUs of the two workers, joined by a comma; empty: CPU")] = "",
    engine_args: Annotated[str, typer.Option(help="vLLM's arguments for both workers, as JSON")] = "{}",
    policy: Annotated[Path, typer.Option(help="policy file of the plugin")] = Path("configs/policy.yaml"),
    seconds: Annotated[float, typer.Option(help="in which sessions begin")] = 12.0,
    session_count: Annotated[int, typer.Option("--sessions", help="of each run")] = 24,
    turns: Annotated[int, typer.Option(help="of a session at most")] = 3,
    first: Annotated[int, typer.Option(help="words of a first prompt")] = 60,
    more: Annotated[int, typer.Option(help="words that a further turn adds")] = 40,
    answer: Annotated[int, typer.Option(help="tokens of the shortest answers")] = 40,
    longest: Annotated[int, typer.Option(help="tokens of the longest ones")] = 600,
    ttft_ms: Annotated[float, typer.Option(help="goodput: first token within")] = 2000.0,
    tpot_ms: Annotated[float, typer.Option(help="goodput: mean time of a token within")] = 50.0,
    repeats: Annotated[int, typer.Option(help="runs of each system")] = 2,
    limit_s: Annotated[float, typer.Option(help="begin no run that would end later than this")] = 3600.0,
    json: Annotated[Path | None, typer.Option("--json", help="file for all samples")] = None,
    logs: Annotated[Path | None, typer.Option(help="folder for the output of all processes")] = None,
) -> None:
    """Preemptions, p99 TTFT, p99 ITL and goodput with and without the plugin, both under --router-mode kv."""
    until = time.monotonic() + limit_s
    end_on_sigterm()
    gpus = tuple(int(word) for word in devices.split(",") if word)
    small = {"num-gpu-blocks-override": 96, "max-model-len": 2048}
    engine = ({"load-format": "dummy"} if gpus or model in SHAPES else small) | arguments_of(engine_args)
    shape = Shape(seconds, session_count, turns, first, more, answer, longest)
    slo = Slo(ttft_ms / 1e3, tpot_ms / 1e3)
    output = Output(machine(), model, time.strftime("%Y-%m-%d"), engine, str(policy), shape, slo)
    console = Console(soft_wrap=True, markup=False, highlight=False)
    own = ("--Frontend.router-mode=kv", f"--Planner.policy-file={policy}", "--Planner.interval-s=1")
    where = {"logs": logs, "overrides": own, "engine": engine, "devices": gpus, "size": Size(0, 2)}
    try:
        with running(Kind.PLANNER_AGG, model, Transport.AUTO, **where) as system:
            console.print(f"ready after {time.monotonic() + limit_s - until:.0f} s")
            measure(output, system, repeats, until, console)
    finally:
        if json is not None and output.runs:
            json.write_bytes(msgspec.json.encode(output))
    show(output, Console(width=120))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
