# SPDX-License-Identifier: Apache-2.0
"""Table and plot of the samples. Percentiles are linear interpolations (numpy's default)."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.migration.measure import Neighbours, Sample
from benchmarks.migration.stock import DYNAMO
from components.migration.messages import Mode

MODES = (*(mode.value for mode in Mode), DYNAMO)


class Report(msgspec.Struct):
    """Raw samples and where they come from."""

    machine: dict[str, str]
    model: str
    transport: str
    samples: list[Sample]
    neighbours: list[Neighbours]
    failed: list[str]
    dtype: str = "auto"


def _of(report: Report, tokens: int, mode: str) -> list[Sample]:
    return [s for s in report.samples if s.tokens == tokens and s.mode == mode]


def _p(values: list[float], q: float) -> float:
    return float(np.percentile(values, q)) if values else float("nan")


def show(report: Report, console: Console) -> None:
    """Ratio first: how many times shorter the downtime is than with token replay. Then times and bytes."""
    times = _table(
        f"{report.model} ({report.dtype}), {report.transport}, {report.machine['cpu']}",
        (
            "prompt",
            "mode",
            "replay/mode",
            "n",
            "downtime p50",
            "p99",
            "stall p50",
            "p99",
            "client gap p50",
            "p99",
            "step",
        ),
    )
    means = _table("", ("prompt", "mode", "total p50", "MB", "rounds", "desc.", "lane"))
    beside = _table(
        "ITL p50 of the neighbours: quiet, in pre-copy, in the whole move",
        ("prompt", "mode", "source quiet", "pre-copy", "move", "target quiet", "pre-copy", "move"),
    )
    for tokens in sorted({s.tokens for s in report.samples}):
        replay = _p([s.downtime_s for s in _of(report, tokens, Mode.REPLAY)], 50)
        for mode in MODES:
            found = _of(report, tokens, mode)
            if not found:
                continue
            downtime = [1e3 * s.downtime_s for s in found]
            stall = [1e3 * s.added_stall_s for s in found]
            times.add_row(
                str(tokens),
                mode,
                f"{1e3 * replay / _p(downtime, 50):.1f}",
                str(len(found)),
                *(f"{_p(downtime, q):.1f}" for q in (50, 99)),
                *(f"{_p(stall, q):.1f}" for q in (50, 99)),
                *(f"{_p([1e3 * s.client_gap_s for s in found], q):.1f}" for q in (50, 99)),
                f"{_p([1e3 * s.step_s for s in found], 50):.1f}",
            )
            means.add_row(
                str(tokens),
                mode,
                f"{_p([1e3 * s.total_s for s in found], 50):.0f}",
                f"{_p([s.bytes / 1e6 for s in found], 50):.1f}",
                f"{_p([float(s.rounds) for s in found], 50):.0f}",
                f"{_p([float(s.descriptors) for s in found], 50):.0f}",
                found[0].lane,
            )
            for seen in (n for n in report.neighbours if n.tokens == tokens and n.mode == mode):
                beside.add_row(str(tokens), mode, *_cells(seen))
    console.print(times, means, *([beside] if report.neighbours else []), sep="\n")
    console.print(
        "times in ms; stall = downtime less the request's median gap between tokens before the move; client gap = its "
        "longest gap from the call until 0.4 s after the move"
    )
    for line in report.failed:
        console.print(f"failed: {line}", style="red")


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title or None)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _cells(seen: Neighbours) -> list[str]:
    cells = []
    for before, *others in (
        (seen.source_before, seen.source_precopy, seen.source_during),
        (seen.target_before, seen.target_precopy, seen.target_during),
    ):
        quiet = _p([1e3 * gap for gap in before], 50)
        cells.append(f"{quiet:.1f}")
        for gaps in others:
            value = _p([1e3 * gap for gap in gaps], 50)
            cells.append(f"{value:.1f} ({value / quiet - 1:+.0%})" if gaps else "-")
    return cells


def plot(report: Report, path: Path) -> None:
    """Added stall over prompt length, one line for each mode."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    lengths = sorted({s.tokens for s in report.samples})
    for mode in MODES:
        stalls = [[1e3 * s.added_stall_s for s in _of(report, tokens, mode)] for tokens in lengths]
        if not any(stalls):
            continue
        p50, p99 = [_p(s, 50) for s in stalls], [_p(s, 99) for s in stalls]
        line = axes.plot(lengths, p50, marker="o", label=f"{mode} p50")[0]
        axes.plot(lengths, p99, marker=".", linestyle=":", color=line.get_color(), label=f"{mode} p99")
    axes.set(xscale="log", yscale="log", xlabel="prompt tokens", ylabel="added stall, ms")
    axes.set_xticks(lengths, [str(tokens) for tokens in lengths])
    axes.set_title(f"{report.model} ({report.dtype}), {report.transport}, {report.machine['cpu']}", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
