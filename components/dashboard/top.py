# SPDX-License-Identifier: Apache-2.0
"""One sample as text for a terminal. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from components.dashboard.sample import Point, Sample
from components.dashboard.tables import moves_table, requests_table
from components.migration.messages import Decision, Verdict

_BLOCKS = " ▁▂▃▄▅▆▇█"
_ROWS = 8
_ID = 8
"""Characters of a request's id that are shown."""


def bar(share: float, width: int = 20) -> Text:
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
        parts.append(requests_table([(each.worker, each.row) for each in sample.requests[:_ROWS]], _ID))
    parts.append(moves_table(sample.moves[:_ROWS], _ID, wide=True))
    if sample.decisions:
        parts.append(_decisions(sample.decisions))
    if error:
        parts.append(Text(error, style="bold red"))
    return Group(*parts)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", expand=True, box=None)
    for column in columns:
        table.add_column(column, no_wrap=column != "why", overflow="fold" if column == "why" else "ellipsis")
    return table


def _workers(sample: Sample) -> Table:
    table = _table("workers", "worker", "role", "KV use", "", "running", "waiting", "tokens/s", "step ms", "")
    loads = {load.worker: load for load in sample.point.workers}
    for worker in sorted(sample.workers, key=lambda worker: (worker.role, worker.worker)):
        state = Text("missing", style="red") if worker.missing else Text("")
        if worker.cordoned:
            state = Text("draining" if worker.draining else "cordoned").append(" ").append_text(state)
        load = loads.get(worker.worker)
        if load is None or worker.stats is None:
            table.add_row(worker.worker, worker.role or "?", *["?"] * 6, state)
            continue
        numbers = (load.running, load.waiting, f"{load.tokens_per_s:.0f}", f"{worker.stats.step_s * 1e3:.1f}")
        table.add_row(load.worker, load.role, bar(load.kv_use), f"{load.kv_use:.0%}", *map(str, numbers), state)
    return table


def _decisions(decisions: Sequence[Decision]) -> Table:
    table = _table("planner", "policy", "decision", "request", "from → to", "why")
    moved = [d for d in decisions if d.verdict is not Verdict.LEAVE][-_ROWS:]
    left = [d for d in decisions if d.verdict is Verdict.LEAVE][: _ROWS - len(moved)]
    for decision in (*reversed(moved), *left):
        way = f"{decision.source} → {decision.target}" if decision.target else decision.source
        table.add_row(decision.policy, decision.verdict, decision.request_id[:_ID], way, decision.reason)
    return table
