# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.policy --quick --json out.json --plot out.png``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import psutil
import typer
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from benchmarks.graph import machine
from benchmarks.policy.calibrate import Fit
from benchmarks.policy.cost import sweep
from benchmarks.policy.report import Output, markdown, plot, plot_costs, show
from benchmarks.policy.runs import bound, cases, requests, run
from benchmarks.policy.speed import cluster, measure
from planner_hooks.config import parse
from planner_hooks.simulate.model import Slo, WorkerModel
from planner_hooks.simulate.traces import Shape
from planner_hooks.snapshot import Snapshot

_TICKS = 100_000
_RESULTS, _REPORT = Path("benchmarks/results/policy-sim.json"), Path("benchmarks/report-policy.md")


def main(
    sizes: Annotated[str, typer.Option(help="numbers of decode workers")] = "4,16,64,256,1024",
    loads: Annotated[str, typer.Option(help="shares of the rate at which the cluster would be full")] = "0.6,0.8,0.95",
    shapes: Annotated[str, typer.Option(help="kinds of load, see runs.py")] = "sticky,heavy,even,wave",
    duration: Annotated[float, typer.Option(help="simulated seconds of clusters up to 64 workers")] = 150.0,
    capacity_tokens: Annotated[int, typer.Option(help="KV of one worker")] = 50_000,
    model_file: Annotated[Path | None, typer.Option("--model", help="file of benchmarks.policy.calibrate")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="4 and 16 workers at 80%, 100 seconds")] = False,
    speed: Annotated[bool, typer.Option("--speed", help="only the time and memory of decisions")] = False,
    json: Annotated[Path | None, typer.Option("--json", help="file for all figures")] = None,
    add: Annotated[bool, typer.Option("--add", help="go on with that file: what it holds is not run again")] = False,
    picture: Annotated[
        Path | None, typer.Option("--plot", help="PNG or SVG file; waves get one more, NAME-cost")
    ] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="run nothing, write benchmarks/report-policy.md from --json")
    ] = False,
) -> None:
    """No migration, Dynamo's KV routing and each policy on the same simulated requests; time of one decision.

    Step time and bandwidth are assumptions about an 8B model on one GPU (planner_hooks/simulate/model.py), not
    measurements; the KV of a worker is what a 24 GB card has left beside the weights.
    """
    if report_only:
        json = json or _RESULTS
        _REPORT.write_text(
            "\n".join(markdown(msgspec.json.decode(json.read_bytes(), type=Output), json)).rstrip() + "\n"
        )
        return
    if quick:
        sizes, loads, duration = "4,16", "0.8", 100.0
    model, slo = WorkerModel(capacity_tokens=capacity_tokens), Slo()
    if model_file is not None:
        model = msgspec.json.decode(model_file.read_bytes(), type=Fit).model
    output = Output(machine(), model, slo, [], [], [])
    if add and json is not None:
        output = msgspec.json.decode(json.read_bytes(), type=Output)
    done = {(result.case, result.variant) for result in output.results}
    numbers = [int(n) for n in sizes.split(",")], [float(u) for u in loads.split(",")]
    all_cases = [] if speed else [case for case in cases(*numbers, duration) if case.shape in shapes.split(",")]
    missing = {case: [v for v in case.variants if (case, v) not in done] for case in all_cases}

    def keep() -> None:
        if json is not None:
            json.write_bytes(msgspec.json.format(msgspec.json.encode(output)))

    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), TextColumn("{task.fields[what]}")) as progress:
        bare = [case for case in all_cases if case not in {b.case for b in output.bounds}]
        priced = {point.case for point in output.points}
        unpriced = [case for case in all_cases if case.shape is Shape.WAVE and case not in priced]
        total = sum(map(len, missing.values())) + len(bare) + len(unpriced) + 2
        task = progress.add_task("simulating", total=total, what="")
        for case in bare:
            progress.update(task, what=f"{case.workers} workers, {case.shape}, {case.load:.0%}: what is possible")
            output.bounds.append(bound(case, requests(case, model), model))
            progress.advance(task)
        for case, variants in missing.items():
            arrivals = requests(case, model) if variants else []
            for variant in variants:
                what = (
                    f"{case.workers} workers, {case.shape}, {case.load:.0%}: {variant.name}, {len(arrivals)} requests"
                )
                progress.update(task, what=what)
                output.results.append(run(case, variant, arrivals, model, slo))
                progress.advance(task)
                keep()
        for case in unpriced:
            where = f"{case.workers} workers, {case.load:.0%}, without migration: "
            rivals = [r for r in output.results if r.case == case and r.variant.scaling and r.variant.policies]
            fastest_ms = min(r.report.ttft_p99_ms for r in rivals)
            output.points += sweep(
                *(case, requests(case, model), model, fastest_ms),
                lambda what, where=where: progress.update(task, what=where + what),
            )
            keep()  # Not after each: a case that the file holds counts as done.
            progress.advance(task)
        if not output.speed:
            progress.update(task, what="time of a decision")
            output.speed = measure()
        progress.advance(task)
        if not output.memory_mib:
            progress.update(task, what=f"memory over {_TICKS if speed else _TICKS // 10:,} decisions")
            output.memory_mib = memory(_TICKS if speed else _TICKS // 10)
        progress.advance(task)
    show(output, Console())
    keep()
    if picture is not None:
        plot(output, picture)
        if output.points:
            plot_costs(output, picture.with_stem(f"{picture.stem}-cost"))


def memory(ticks: int) -> list[tuple[int, float]]:
    """Resident memory while the same policies decide again and again, on a small cluster."""
    policy, capture = parse({}).build(), cluster(8, 100)
    found, this = [], psutil.Process()
    for tick in range(ticks + 1):
        if tick % (ticks // 4) == 0:
            found.append((tick, this.memory_info().rss / (1 << 20)))
        policy.plan(Snapshot.of(capture))
    return found


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
