# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.migration.timeline FOLDER``: where the time of a move goes.

Reads what processes have written with ``DYN_MIGRATE_TIMELINE=FOLDER`` (``components.timeline``) and shows, for each
step, how long after the end of the source's last step it came: median and 10th and 90th percentiles of all moves.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

_BEGIN, _ZERO, _TOKEN = "begun", "last step ended", "token"
_COLOURS = {"source": "#0072b2", "source-core": "#56b4e9", "target-core": "#e69f00", "target": "#d55e00"}
"""Rows of the picture, from above: worker and engine core of each side."""


class Mark(NamedTuple):
    """One step of one move; ``at`` in seconds on the host's monotonic clock."""

    at: float
    who: str
    what: str
    request: str


def read(folder: Path) -> list[Mark]:
    """All marks in a folder, in the order of time."""
    found = []
    for path in folder.glob("*.marks"):
        for line in path.read_text().splitlines():
            at, who, *what, request = line.split(" ")
            found.append(Mark(float(at), who, " ".join(what), request))
    return sorted(found)


def moves_of(marks: Iterable[Mark]) -> list[list[Mark]]:
    """The marks of each move that came as far as the end of the source's last step."""
    moves: list[list[Mark]] = []
    under_way: dict[str, list[Mark]] = {}
    for mark in marks:
        if mark.what == _BEGIN:
            under_way[mark.request] = []
            moves.append(under_way[mark.request])
        if mark.request in under_way:
            under_way[mark.request].append(mark)
    return [move for move in moves if any(mark.what == _ZERO for mark in move)]


def steps_of(moves: Sequence[Sequence[Mark]]) -> dict[tuple[str, str], list[float]]:
    """Milliseconds after the source's last step at which each step came first, by (who, what), in order."""
    found = defaultdict(list)
    for move in moves:
        zero = next(mark.at for mark in move if mark.what == _ZERO)
        first: dict[tuple[str, str], float] = {}
        for mark in move:
            # Of tokens before the hand-over, the last one is what its client waits from.
            if mark.what != _TOKEN:
                first.setdefault((mark.who, mark.what), mark.at)
            elif (mark.who, "first token") not in first:
                first[mark.who, "last token before"] = mark.at
        for step, at in first.items():
            found[step].append(1e3 * (at - zero))
    return dict(sorted(found.items(), key=lambda item: float(np.median(item[1]))))


def plot(steps: dict[tuple[str, str], list[float]], path: Path, from_ms: float = -15.0) -> None:
    """A row for each process: medians as points, 10th to 90th percentiles as lines."""
    import matplotlib.pyplot as plt

    shown = {step: times for step, times in steps.items() if float(np.median(times)) >= from_ms}
    figure, axes = plt.subplots(figsize=(9, 0.28 * len(shown) + 1))
    for row, ((who, _), times) in enumerate(reversed(shown.items())):
        low, middle, high = np.percentile(times, (10, 50, 90))
        axes.plot([low, high], [row, row], color=_COLOURS.get(who, "grey"), linewidth=4, alpha=0.4)
        axes.plot(middle, row, "o", color=_COLOURS.get(who, "grey"))
        axes.annotate(f"{middle:.1f}", (high, row), textcoords="offset points", xytext=(6, -3), fontsize=7)
    axes.set_yticks(range(len(shown)), [f"{who}: {what}" for who, what in reversed(shown)], fontsize=7)
    axes.set_xlabel("milliseconds after the source's last step")
    axes.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)


def main(
    folder: Annotated[Path, typer.Argument(help="value of DYN_MIGRATE_TIMELINE", exists=True, file_okay=False)],
    picture: Annotated[Path | None, typer.Option("--plot", help="PNG or SVG file")] = None,
) -> None:
    """Shows each step of the moves in a folder: when it came after the source's last step."""
    moves = moves_of(read(folder))
    if not moves:
        raise typer.BadParameter(f"no move in {folder}: start the graph with DYN_MIGRATE_TIMELINE={folder}")
    steps = steps_of(moves)
    table = Table(title=f"{len(moves)} moves; milliseconds after the source's last step")
    for column in ("who", "what", "p50", "p10", "p90"):
        table.add_column(column, justify="left" if column.startswith("wh") else "right")
    for (who, what), times in steps.items():
        low, middle, high = np.percentile(times, (10, 50, 90))
        table.add_row(who, what, f"{middle:.2f}", f"{low:.2f}", f"{high:.2f}")
    Console().print(table)
    if picture is not None:
        plot(steps, picture)
    os._exit(0)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
