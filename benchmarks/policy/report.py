# SPDX-License-Identifier: Apache-2.0
"""Tables and plots. Ratio first: how many times lower the P99 TTFT is than without migration, in the same run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.policy.runs import Bound, Case, Result
from benchmarks.policy.speed import Speed
from planner_hooks.simulate.model import Slo, WorkerModel
from planner_hooks.simulate.traces import Shape


class Output(msgspec.Struct):
    """Everything that was measured."""

    machine: dict[str, str]
    model: WorkerModel
    slo: Slo
    results: list[Result]
    speed: list[Speed]
    memory_mib: list[tuple[int, float]]
    """(decisions made, resident memory)."""
    bounds: list[Bound] = []
    """One for each case."""


def ratio(results: list[Result], one: Result) -> float:
    """P99 TTFT without migration, divided by that of a variant of the same case."""
    base = next(r for r in results if r.case == one.case and r.variant.name == "no migration")
    return base.report.ttft_p99_ms / max(one.report.ttft_p99_ms, 1e-9)


def show(output: Output, console: Console) -> None:
    """All tables."""
    seen: list[Case] = []
    for result in output.results:
        if result.case not in seen:
            seen.append(result.case)
    for case in seen:
        console.print(_table(output, case))
    if output.results:
        console.print(
            "times in ms; saved = worker-hours less than with all workers all the time; goodput within the SLO"
        )
    if output.speed:
        console.print(_speed(output.speed))
    if output.memory_mib:
        counts = ", ".join(f"{mib:.0f} MiB after {count:,}" for count, mib in output.memory_mib)
        console.print(f"memory over decisions: {counts}")


def _table(output: Output, case: Case) -> Table:
    rows = [r for r in output.results if r.case == case]
    title = f"{case.workers} workers, {case.shape}, {case.load:.0%} load, {case.duration_s:g} s"
    table = Table(title=title)
    for column in ("variant", "P99 TTFT lower by", "TTFT p50", "p99", "TPOT p50", "p99", "goodput", "preempted"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for column in ("moved", "GB", "worker-h", "saved", "decision"):
        table.add_column(column, justify="right")
    hours = _all_the_time(rows, rows[0])
    at_best = next((b for b in output.bounds if b.case == case), None)
    if at_best is not None:
        base = next(r for r in rows if r.variant.name == "no migration").report.ttft_p99_ms
        saved = "" if at_best.saved is None else f"; at most {at_best.saved:.1%} saved"
        table.caption = f"no policy can do better than {base / at_best.ttft_p99_ms:.2f}x{saved}"
    for row in rows:
        r = row.report
        table.add_row(
            row.variant.name,
            f"{ratio(output.results, row):.2f}x",
            *(f"{value:.1f}" for value in (r.ttft_p50_ms, r.ttft_p99_ms, r.tpot_p50_ms, r.tpot_p99_ms)),
            f"{r.goodput:.1%}",
            *(str(value) for value in (r.preemptions, r.migrations)),
            *(f"{r.gb_moved:.0f}", f"{r.worker_hours:.2f}"),
            f"{1 - r.worker_hours / hours:.1%}" if row.variant.scaling else "",
            f"{r.decision_ms:.2f}",
        )
    return table


def _speed(rows: list[Speed]) -> Table:
    table = Table(title="one decision of all policies, one core")
    for column in ("workers", "requests", "moves", "median ms", "slowest ms", "us per 1,000 requests"):
        table.add_column(column, justify="right")
    for column in ("columns ms", "observe ms", "decode ms"):
        table.add_column(column, justify="right")
    for r in rows:
        each = 1e6 * r.decision_ms / r.requests
        numbers = (f"{r.decision_ms:.2f}", f"{r.decision_max_ms:.2f}", f"{each:.0f}")
        numbers += (f"{r.columns_ms:.1f}", f"{r.observe_ms:.1f}", f"{r.decode_ms:.1f}")
        table.add_row(str(r.workers), str(r.requests), str(r.moves), *numbers)
    return table


def plot(output: Output, path: Path) -> None:
    """P99 TTFT over cluster size for the uneven load, worker-hours against P99 TTFT, and the growth of a decision."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    uneven = [r for r in output.results if r.case.shape is Shape.STICKY]
    sizes = Counter(load for _, load in {(r.case.workers, r.case.load) for r in uneven})
    load = max(sizes, key=lambda load: (sizes[load], load), default=0.0)  # The one that most sizes were run at.
    for name in dict.fromkeys(r.variant.name for r in uneven):
        points = [
            (r.case.workers, r.report.ttft_p99_ms) for r in uneven if r.variant.name == name and r.case.load == load
        ]
        left.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    left.set(xscale="log", yscale="log", xlabel="workers", ylabel="P99 TTFT, ms", title=f"sticky, {load:.0%} load")
    waves = [r for r in output.results if r.case.shape is Shape.WAVE]
    for name in dict.fromkeys(r.variant.name for r in waves):
        rows = [r for r in waves if r.variant.name == name]
        saved = [100 * (1 - r.report.worker_hours / _all_the_time(output.results, r)) for r in rows]
        middle.plot(saved, [r.report.ttft_p99_ms for r in rows], marker="o", linestyle="", label=name)
    middle.set(yscale="log", xlabel="worker-hours saved, %", ylabel="P99 TTFT, ms", title="waves, all sizes and loads")
    if output.speed:
        requests = [s.requests for s in output.speed]
        right.plot(requests, [s.decision_ms for s in output.speed], marker="o", label="median")
        right.plot(requests, [s.decision_max_ms for s in output.speed], marker=".", linestyle=":", label="slowest")
        right.axhline(20, color="grey", linewidth=0.8)
    right.set(xscale="log", yscale="log", xlabel="running requests", ylabel="ms", title="one decision, one core")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        if axes.get_lines():
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def _all_the_time(results: list[Result], one: Result) -> float:
    """Worker-hours of a case without scaling."""
    base = next(r for r in results if r.case == one.case and r.variant.name == "no migration")
    return base.report.worker_hours
