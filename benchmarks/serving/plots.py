# SPDX-License-Identifier: Apache-2.0
"""Plots of the report: CDFs of latency, gaps around migrations over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.metrics import Run
from benchmarks.serving.parts import Kind
from benchmarks.serving.workloads import Workload


def draw(runs: list[Run], folder: Path) -> list[tuple[str, str]]:
    """Write the PNG files; names and what they show."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = []
    for name, text, work in (
        ("serving-cdf.png", "CDF of TTFT and ITL by workload", lambda: _cdf(pyplot, runs)),
        (
            "serving-timeline.png",
            "gaps between tokens over time, migrations and restarts shaded",
            lambda: _time(pyplot, runs),
        ),
    ):
        figure = work()
        if figure is not None:
            figure.savefig(folder / name, dpi=110)
            pyplot.close(figure)
            drawn.append((name, text))
    return drawn


def _cdf(pyplot: Any, runs: list[Run]) -> Any:
    shown = [
        w
        for w in (Workload.STEADY, Workload.BURSTY, Workload.SKEWED, Workload.MIXED)
        if any(r.workload == w for r in runs)
    ]
    if not shown:
        return None
    figure, axes = pyplot.subplots(2, len(shown), figsize=(3.4 * len(shown), 6), layout="constrained", squeeze=False)
    for column, workload in enumerate(shown):
        for kind in Kind:
            samples = [
                s for r in runs if r.system == kind and r.workload == workload for s in r.samples if not s.failed
            ]
            if not samples:
                continue
            for row, values in enumerate(([s.ttft_s for s in samples], [gap for s in samples for gap in s.itls_s])):
                data = 1e3 * np.sort(values)
                axes[row][column].plot(data, np.linspace(0, 1, len(data)), label=kind.value)
        axes[0][column].set(title=workload.value, xscale="log", xlabel="TTFT, ms")
        axes[1][column].set(xscale="log", xlabel="ITL, ms")
    axes[0][0].legend(fontsize=7)
    return figure


def _time(pyplot: Any, runs: list[Run]) -> Any:
    shown = [
        run
        for workload in (Workload.MOVED, Workload.RESTART, Workload.SCALE_DOWN)
        for kind in (Kind.OURS, Kind.STOCK)
        for run in [r for r in runs if r.system == kind and r.workload == workload][-1:]
    ]
    if not shown:
        return None
    figure, axes = pyplot.subplots(len(shown), 1, figsize=(9, 1.9 * len(shown)), layout="constrained", squeeze=False)
    for run, axis in zip(shown, axes[:, 0], strict=True):
        begin = min(s.start_s for s in run.samples)
        for sample in run.samples:
            times = sample.start_s - begin + sample.ttft_s + np.cumsum(sample.itls_s)
            colour = "tab:red" if sample.failed else "tab:blue"
            axis.scatter(times, 1e3 * np.asarray(sample.itls_s), s=2, color=colour, alpha=0.4)
        for event in run.events:
            axis.axvspan(event.begin_s - begin, event.end_s - begin, color="tab:orange", alpha=0.2)
        axis.set(yscale="log", ylabel="ITL, ms")
        axis.set_title(f"{run.system}, {run.workload} (red: requests that failed)", fontsize=8)
    axes[-1, 0].set_xlabel("seconds")
    return figure
