# SPDX-License-Identifier: Apache-2.0
"""One sample as the terminal shows it. Pure: nothing is asked here."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from components.dashboard.sample import Point, Sample
from components.messages import Decision, MoveRecord, StreamInfo, Verdict

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
        return Panel(error or "waiting for a router", title="dynamo top")
    point, status = sample.point, sample.status
    head = Text(
        f"{point.tokens_per_s:8.0f} tokens/s   {point.streams} requests   {point.waiting} waiting   "
        f"{point.moving} moving\n"
    )
    head.append(spark([p.tokens_per_s for p in history]), style="cyan")
    parts: list[RenderableType] = [Panel(head, title="dynamo top"), _workers(sample)]
    if status.streams:
        parts.append(_streams(status.streams))
    parts.append(_moves(status.moves))
    if status.decisions:
        parts.append(_decisions(status.decisions))
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
    infos = {worker.worker: worker for worker in sample.status.workers}
    for load in sample.point.workers:
        info = infos[load.worker]
        step = f"{info.stats.step_s * 1e3:.1f}" if info.stats else "?"
        numbers = (str(load.running), str(load.waiting), f"{load.tokens_per_s:.0f}", step)
        state = "draining" if info.draining else ""
        table.add_row(load.worker, load.role, bar(load.kv_use), f"{load.kv_use:.0%}", *numbers, state)
    return table


def _streams(streams: Sequence[StreamInfo]) -> Table:
    table = _table("requests", "request", "worker", "prompt", "output", "age s", "moves", "replays", "")
    for stream in sorted(streams, key=lambda s: -s.age_s)[:_ROWS]:
        numbers = (stream.prompt_tokens, stream.output_tokens, f"{stream.age_s:.1f}", stream.moves, stream.replays)
        now = Text("moving", style="magenta") if stream.moving else Text("")
        table.add_row(stream.request_id[:_ID], stream.worker, *map(str, numbers), now)
    return table


def _moves(moves: Sequence[MoveRecord]) -> Table:
    columns = ("request", "from → to", "mode", "result", "down ms", "rounds", "MB", "lane")
    table = _table("last migrations", *columns)
    last = sorted(moves, key=lambda move: -move.ended_at)[:_ROWS]
    most_rounds = max((move.rounds for move in last), default=0) or 1
    most_bytes = max((move.bytes for move in last), default=0) or 1
    for move in last:
        result = Text("done", style="green") if move.ok else Text(move.reason, style="red")
        table.add_row(
            move.request_id[:_ID],
            f"{move.source} → {move.target}",
            move.mode,
            result,
            f"{move.downtime_s * 1e3:.1f}",
            bar(move.rounds / most_rounds, 5).append(f" {move.rounds}", style="default"),
            bar(move.bytes / most_bytes, 8).append(f" {move.bytes / 1e6:.1f}", style="default"),
            move.lane,
        )
    return table


def _decisions(decisions: Sequence[Decision]) -> Table:
    table = _table("planner", "policy", "decision", "request", "from → to", "why")
    moved = [d for d in decisions if d.verdict is not Verdict.LEAVE][-_ROWS:]
    left = [d for d in decisions if d.verdict is Verdict.LEAVE][: _ROWS - len(moved)]
    for decision in (*reversed(moved), *left):
        way = f"{decision.source} → {decision.target}" if decision.target else decision.source
        table.add_row(decision.policy, decision.verdict, decision.request_id[:_ID], way, decision.reason)
    return table
