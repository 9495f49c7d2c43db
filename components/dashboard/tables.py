# SPDX-License-Identifier: Apache-2.0
"""Workers, requests and migrations as tables of at most 80 columns, or of any width with ``wide``.

An id is shortened to the characters that distinguish it from the others; commands accept these.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from components.migration.messages import Decision, MoveRecord, RequestRow
from components.status import Status, WorkerReport

_SHORTEST = 8
_OLD_S = 5.0
_UNBOUNDED = 1000


def console(wide: bool = False) -> Console:
    """For standard output; a wide table is not cut at the terminal's edge."""
    return Console(width=_UNBOUNDED if wide else None)


def id_length(ids: Iterable[str], wide: bool = False) -> int:
    """Number of characters that distinguish these ids; at least eight. ``wide``: all of them."""
    if wide:
        return _UNBOUNDED
    names = set(ids)
    length = _SHORTEST
    while len({name[:length] for name in names}) < len(names):
        length += 1
    return length


def table(title: str, columns: Collection[str], folded: str = "") -> Table:
    """An empty one; the column ``folded`` takes several lines where there is no room."""
    found = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in columns:
        found.add_column(column, no_wrap=column != folded, overflow="fold")
    return found


def show_status(status: Status, requests: int, out: Console, wide: bool = False) -> None:
    """The output of ``dynamo status``."""
    columns = ["worker", "role", "run", "wait", "relays", "KV use", *(["epoch", "lanes"] if wide else []), "state"]
    found = table("workers", columns, folded="state")
    for w in status.workers:
        s, info = w.stats, w.info
        used = f"{1 - s.free_blocks / max(1, s.total_blocks):.0%}" if s else "?"
        counts = (str(s.running), str(s.waiting)) if s else ("?", "?")
        relays = str(sum(bool(row.relayed_from) for row in w.requests)) if s else "?"
        more = []
        if wide:
            more = [", ".join(agent.epoch for agent in info.agents), ", ".join(info.lanes)] if info else ["?", "?"]
        found.add_row(w.worker, w.role or "?", *counts, relays, used, *more, condition(w))
    out.print(found)
    running = sorted(status.requests(), key=lambda pair: -pair[1].age_s)
    if not running:
        out.print("no request is running")
    elif requests:
        _requests(running, requests, out, wide)
    if len(running) > requests:
        out.print(f"{len(running) - requests} more requests; --requests {len(running)} shows them")
    if status.moves:
        show_moves(status.moves[-10:], out, wide)


def condition(worker: WorkerReport) -> str:
    """A worker's condition (draining, missing, old data), as console markup."""
    found = ["draining" if worker.draining else "cordoned"] if worker.cordoned else []
    if worker.missing:
        found.append(f"[red]missing[/] ({escape(worker.missing)})")
    if worker.stats is not None and worker.age_s > _OLD_S:
        found.append(f"as of {worker.age_s:.0f} s ago")
    return ", ".join(found)


def _requests(running: Sequence[tuple[WorkerReport, RequestRow]], count: int, out: Console, wide: bool) -> None:
    rows = [(worker.worker, row) for worker, row in running]
    length = id_length((row.request_id for _, row in rows), wide)
    out.print(requests_table(rows[:count], length))
    stay: dict[str, list[str]] = {}
    for _, r in rows[:count]:
        if r.not_migratable:
            stay.setdefault(r.not_migratable, []).append(r.request_id[:length])
    for why, names in stay.items():
        out.print(f"{', '.join(names)} cannot move: {why}", markup=False)


def requests_table(rows: Iterable[tuple[str, RequestRow]], length: int) -> Table:
    """Requests and their workers; ``length``: of the ids."""
    found = table("\nrequests", ["request", "worker", "phase", "prompt", "output", "age s", "moves", ""])
    for worker, r in rows:
        numbers = (str(r.prompt_tokens), str(r.output_tokens), f"{r.age_s:.0f}", str(r.moves))
        state = "moving" if r.moving else "unread" if not r.attached else "stays" if r.not_migratable else ""
        found.add_row(r.request_id[:length], worker, r.phase, *numbers, state)
    return found


def _result(move: MoveRecord) -> str:
    if not move.ok:
        return move.code or "failed"
    return f"{move.mode} ({move.code})" if move.code else move.mode


def show_moves(moves: Sequence[MoveRecord], out: Console, wide: bool = False) -> None:
    """The table of migrations, with reasons below it for those that failed or changed their mode."""
    if not moves:
        out.print("nothing had to be moved")
        return
    length = id_length((move.request_id for move in moves), wide)
    out.print(moves_table(moves, length, wide))
    for m in moves:
        if m.code or m.reason:
            out.print(f"{m.request_id[:length]}: {': '.join(filter(None, (m.code, m.reason)))}", markup=False)


def moves_table(moves: Iterable[MoveRecord], length: int, wide: bool) -> Table:
    """Migrations; ``length``: of the ids."""
    columns = ["request", "from", "to", "result", "downtime ms", "MB"]
    found = table("\nmigrations", [*columns, *(["added stall ms", "rounds", "lane"] if wide else [])])
    for m in moves:
        figures = [f"{m.downtime_s * 1e3:.1f}", f"{m.bytes / 1e6:.1f}"]
        if wide:
            figures += [f"{m.added_stall_s * 1e3:.1f}", str(m.rounds), m.lane]
        found.add_row(m.request_id[:length], m.source, m.target, escape(_result(m)), *figures)
    return found


def decisions_table(title: str, decisions: Iterable[Decision], length: int) -> Table:
    """A planner's decisions; ``length``: of the ids."""
    found = table(title, ["policy", "decision", "request", "from → to", "why"], folded="why")
    for d in decisions:
        way = f"{d.source} → {d.target}" if d.target else d.source
        found.add_row(d.policy, d.verdict, d.request_id[:length], way, escape(d.reason))
    return found
