# SPDX-License-Identifier: Apache-2.0
"""Tables and plots. Ratio first: how many times lower the P99 TTFT is than without migration, in the same run."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.policy.cost import Point, Price, prices
from benchmarks.policy.runs import Bound, Case, Result
from benchmarks.policy.speed import Speed
from planner_hooks.simulate.model import Slo, WorkerModel
from planner_hooks.simulate.report import Report
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
    points: list[Point] = []
    """Clusters without migration, for worker-hours at equal P99 TTFT."""

    def base(self, case: Case) -> Report:
        """All workers all the time, round robin, no migration."""
        return next(r.report for r in self.results if r.case == case and r.variant.name == "no migration")


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
    if output.points:
        console.print(_prices(prices(output.results, output.points)))
    if output.speed:
        console.print(_speed(output.speed))
    if output.memory_mib:
        counts = ", ".join(f"{mib:.0f} MiB after {count:,}" for count, mib in output.memory_mib)
        console.print(f"memory over decisions: {counts}")


def _table(output: Output, case: Case) -> Table:
    names = [variant.name for variant in case.variants]
    rows = sorted((r for r in output.results if r.case == case), key=lambda r: names.index(r.variant.name))
    title = f"{case.workers} workers, {case.shape}, {case.load:.0%} load, {case.duration_s:g} s"
    table = Table(title=title)
    for column in ("variant", "P99 TTFT lower by", "TTFT p50", "p99", "TPOT p50", "p99", "goodput", "preempted"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for column in ("moved", "GB", "worker-h", "saved", "decision"):
        table.add_column(column, justify="right")
    base = output.base(case)
    at_best = next((b for b in output.bounds if b.case == case), None)
    if at_best is not None:
        saved = "" if at_best.saved is None else f"; at most {at_best.saved:.1%} saved"
        table.caption = f"no policy can do better than {base.ttft_p99_ms / at_best.ttft_p99_ms:.2f}x{saved}"
    for row in rows:
        r = row.report
        table.add_row(
            row.variant.name,
            f"{base.ttft_p99_ms / max(r.ttft_p99_ms, 1e-9):.2f}x",
            *(f"{value:.1f}" for value in (r.ttft_p50_ms, r.ttft_p99_ms, r.tpot_p50_ms, r.tpot_p99_ms)),
            f"{r.goodput:.1%}",
            *(str(value) for value in (r.preemptions, r.migrations)),
            *(f"{r.gb_moved:.0f}", f"{r.worker_hours:.2f}"),
            f"{1 - r.worker_hours / base.worker_hours:.1%}" if row.variant.scaling else "",
            f"{r.decision_ms:.2f}",
        )
    return table


def _prices(found: list[Price]) -> Table:
    table = Table(title="worker-hours at equal P99 TTFT: the cheapest cluster without migration that is as fast")
    for column in ("case", "with migration", "saved", "P99 TTFT", "worker-h", "without", "P99 TTFT", "worker-h"):
        table.add_column(column, justify="left" if column in ("case", "with migration", "without") else "right")
    for price in found:
        case, r, point = price.result.case, price.result.report, price.point
        ours = (f"{r.ttft_p99_ms:.0f}", f"{r.worker_hours:.2f}")
        name = (f"{case.workers} workers, {case.load:.0%}", price.result.variant.name)
        if point is None:
            table.add_row(*name, "", *ours, "none tried was as fast")
            continue
        planner = "all the time" if point.full is None else f"usage up to {point.full:.0%}"
        theirs = (f"{point.workers}, {planner}", f"{point.ttft_p99_ms:.0f}", f"{point.worker_hours:.2f}")
        table.add_row(*name, f"{price.saved:.1%}", *ours, *theirs)
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
        saved = [100 * (1 - r.report.worker_hours / output.base(r.case).worker_hours) for r in rows]
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


def plot_costs(output: Output, path: Path) -> None:
    """P99 TTFT over worker-hours, with and without migration; one panel for each case of waves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys(point.case for point in output.points))
    rows = math.ceil(len(cases) / 4)
    figure, panels = pyplot.subplots(rows, 4, figsize=(16, 4 * rows), layout="constrained", squeeze=False)
    for axes in panels.flat[len(cases) :]:
        axes.axis("off")
    for case, axes in zip(cases, panels.flat, strict=False):
        for kv_routing, colour in ((False, "tab:blue"), (True, "tab:green")):
            routing = "KV routing" if kv_routing else "round robin"
            for scaled, marker in ((False, "o"), (True, "^")):
                here = [p for p in output.points if p.case == case and p.kv_routing == kv_routing]
                series = [(p.worker_hours, p.ttft_p99_ms) for p in here if (p.full is not None) == scaled]
                how = "scaled" if scaled else "all the time"
                axes.plot(*zip(*sorted(series), strict=True), marker=marker, color=colour, label=f"{routing}, {how}")
            ours = [
                (r.report.worker_hours, r.report.ttft_p99_ms)
                for r in output.results
                if r.case == case
                and r.variant.scaling
                and len(r.variant.policies) > 2
                and r.variant.kv_routing == kv_routing
            ]
            axes.plot(
                *zip(*ours, strict=True), marker="*", ms=14, linestyle="", color=colour, label=f"{routing}, migration"
            )
        axes.set(yscale="log", xlabel="worker-hours", ylabel="P99 TTFT, ms")
        axes.set_title(f"{case.workers} workers, peak load {case.load:.0%}")
        axes.grid(alpha=0.3)
    panels.flat[0].legend(fontsize=7)
    figure.savefig(path, dpi=150)
