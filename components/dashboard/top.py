# SPDX-License-Identifier: Apache-2.0
"""One sample as text for a terminal. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from components.dashboard.sample import Point, Sample
from components.dashboard.tables import condition, decisions_table, moves_table, requests_table, table
from components.migration.messages import Decision, Verdict

_BLOCKS = " ▁▂▃▄▅▆▇█"
_ROWS = 8
_ID = 8
"""Characters of a request's id that are shown."""


def bar(share: float, width: int = 8) -> Text:
    """A horizontal bar, green to red."""
    share = min(1.0, max(0.0, share))
    colour = "green" if share < 0.7 else "yellow" if share < 0.9 else "red"
    full = round(share * width)
    return Text("█" * full, style=colour).append("░" * (width - full), style="dim")


def spark(values: Sequence[float], width: int = 60) -> str:
    """The last values as one line of blocks."""
    values = list(values)[-width:]
    top = max(values, default=0.0) or 1.0
    return "".join(_BLOCKS[round(value / top * (len(_BLOCKS) - 1))] for value in values)


def view(sample: Sample | None, history: Sequence[Point], error: str = "") -> RenderableType:
    """The whole screen."""
    if sample is None:
        return Panel(Text(error or "waiting for workers"), title="dynamo top")
    point = sample.point
    head = Text(
        f"{point.tokens_per_s:8.0f} tokens/s   {point.requests} requests   {point.waiting} waiting   "
        f"{point.moving} moving\n"
    )
    head.append(spark([p.tokens_per_s for p in history]), style="cyan")
    parts: list[RenderableType] = [Panel(head, title="dynamo top"), _workers(sample)]
    if sample.requests:
        parts.append(requests_table(sample.requests[:_ROWS], _ID))
    parts.append(moves_table(sample.moves[:_ROWS], _ID, wide=False))
    if sample.decisions:
        parts.append(decisions_table("\nplanner", _last(sample.decisions), _ID))
    if error:
        parts.append(Text(error, style="bold red"))
    return Group(*parts)


def _workers(sample: Sample) -> Table:
    columns = ("worker", "role", "KV use", "run", "wait", "tokens/s", "step ms", "state")
    found = table("workers", columns, folded="state")
    loads = {load.worker: load for load in sample.point.workers}
    for worker in sorted(sample.workers, key=lambda worker: (worker.role, worker.worker)):
        load = loads.get(worker.worker)
        if load is None or worker.stats is None:
            found.add_row(worker.worker, worker.role or "?", *["?"] * 5, condition(worker))
            continue
        use = (bar(load.kv_use).append(f" {load.kv_use:.0%}", style="default"), str(load.running), str(load.waiting))
        rates = (f"{load.tokens_per_s:.0f}", f"{worker.stats.step_s * 1e3:.1f}")
        found.add_row(load.worker, load.role, *use, *rates, condition(worker))
    return found


def _last(decisions: Sequence[Decision]) -> list[Decision]:
    moved = [d for d in decisions if d.verdict is not Verdict.LEAVE][-_ROWS:]
    return [*reversed(moved), *[d for d in decisions if d.verdict is Verdict.LEAVE][: _ROWS - len(moved)]]
