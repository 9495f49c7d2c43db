# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.policy --traces conversation_trace.jsonl,azure_conv.csv,burstgpt --json out.json``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import psutil
import typer
from rich.console import Console

from benchmarks.graph import machine
from benchmarks.policy import cases
from benchmarks.policy.report import Output, markdown
from benchmarks.policy.runs import SEED, SLO, VARIANTS, bound, scenarios, variants
from benchmarks.policy.speed import cluster, measure
from planner_hooks.config import parse
from planner_hooks.simulate.model import WorkerModel
from planner_hooks.simulate.scenario import requests
from planner_hooks.snapshot import Snapshot

_TICKS = 10_000
_RESULTS, _REPORT = Path("benchmarks/results/policy-sim.json"), Path("benchmarks/report-policy.md")


def main(
    traces: Annotated[str, typer.Option(help="trace files joined by commas; burstgpt is made")] = "burstgpt",
    sizes: Annotated[str, typer.Option(help="numbers of workers")] = "4,16,64,256,1024",
    groups: Annotated[str, typer.Option(help="of runs, see runs.py")] = "steady,cases,restart,swing",
    samples: Annotated[int, typer.Option(help="of each trace under steady load, where anything moves")] = 6,
    policies: Annotated[Path, typer.Option(help="policy file")] = Path("configs/policy.yaml"),
    speed: Annotated[bool, typer.Option("--speed", help="only the time and memory of decisions")] = False,
    json: Annotated[Path, typer.Option("--json", help="file for all figures")] = _RESULTS,
    add: Annotated[bool, typer.Option("--add", help="go on with that file: what it holds is not run again")] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="run nothing, write benchmarks/report-policy.md from --json")
    ] = False,
) -> None:
    """What policies gain on simulated H200 workers under Dynamo's KV routing, and the time of a decision."""
    console = Console(soft_wrap=True, markup=False, highlight=False)
    output = Output(machine(), WorkerModel(), SLO)
    if add or report_only:
        output = msgspec.json.decode(json.read_bytes(), type=Output)
    if report_only:
        _REPORT.write_text("\n".join(markdown(output, json)) + "\n")
        return

    def keep() -> None:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(output), indent=0))

    if not speed:
        done = {(result.group, result.scenario) for result in output.results}
        # Where nothing moves, another sample shows nothing either.
        still = {r.scenario for r in output.results if r.variant == VARIANTS[1] and not r.report.migrations}
        numbers = [int(size) for size in sizes.split(",")]
        for group, chosen in scenarios(traces.split(","), numbers, samples).items():
            for scenario in chosen if group in groups.split(",") else []:
                if (group, scenario) in done or msgspec.structs.replace(scenario, seed=SEED) in still:
                    continue
                arrivals = cases.arrivals(scenario) if group == "cases" else requests(scenario)
                found = list(variants(group, scenario, arrivals, policies))
                still |= {r.scenario for r in found if r.variant == VARIANTS[1] and not r.report.migrations}
                output.results += found
                output.bounds += [bound(scenario, arrivals)] if group in ("steady", "cases") else []
                keep()
                for run in found:
                    r = run.report
                    console.print(
                        f"{group}, {Path(scenario.trace).stem}, {scenario.workers} workers, {scenario.load:.0%}, "
                        f"{scenario.kv_tokens} tokens, {len(arrivals)} requests, {run.variant}: p99 TTFT "
                        f"{r.ttft_p99_ms:,.0f} ms, TPOT {r.tpot_p99_ms:.1f} ms, goodput {r.goodput:.1%}, "
                        f"{r.preemptions} preempted, {r.migrations} moves, {r.worker_hours:.2f} h"
                    )
        output.results.sort(key=lambda result: (result.group, msgspec.structs.astuple(result.scenario)))
    output.speed, output.memory_mib = measure(), memory(_TICKS)
    keep()
    console.print("\n".join(markdown(output, json)))


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
