# SPDX-License-Identifier: Apache-2.0
"""``dynamo status``, ``dynamo migrate``, ``dynamo drain`` and ``dynamo undrain``."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, TypeVar

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from components import process
from components.client import Drained, Workers
from components.errors import MigrateError
from components.migration.messages import Mode, MoveRecord, RequestRow
from components.serve.state import reach
from components.status import Status, WorkerReport

T = TypeVar("T")
_WHOLE = {"worker": 8, "from": 8, "to": 8, "request": 36}
"""Ids are arguments of other commands: a narrow terminal must not cut them."""
_OLD_S = 5.0
Json = Annotated[bool, typer.Option("--json", help="machine-readable output")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("status")(status)
    app.command("migrate")(migrate)
    app.command("drain")(drain)
    app.command("undrain")(undrain)


def _run(
    work: Callable[[Workers], Awaitable[T]], show: Callable[[T], None], well: Callable[[T], bool] = lambda _: True
) -> None:
    """Ask the workers, show the answer, and end: with 0, with 1 when it is not ``well``, with 2 after an error."""

    async def main() -> T:
        workers = await Workers.connect(process.connect(), process.namespace())
        await workers.refresh(decisions=True)
        return await work(workers)

    reach()
    try:
        answer = asyncio.run(main())
        show(answer)
    except MigrateError as error:
        print(f"error: {error}", file=sys.stderr)
        os._exit(2)
    sys.stdout.flush()
    # Dynamo's native runtime may abort in the interpreter's finalisation.
    os._exit(0 if well(answer) else 1)


def _json(value: object) -> None:
    print(msgspec.json.format(msgspec.json.encode(value)).decode())


def status(
    requests: Annotated[int, typer.Option(min=0, help="how many requests to show, the oldest first")] = 50,
    json: Json = False,
) -> None:
    """Show workers, running requests and the last migrations. A worker that does not answer is shown as missing.

    \b
    dynamo status
    dynamo status --requests 0
    dynamo status --json
    """

    async def known(workers: Workers) -> Status:
        return workers.status()

    _run(known, _json if json else (lambda found: tables(found, requests, Console())))


def tables(status: Status, requests: int, console: Console) -> None:
    """Everything, for people."""
    table = Table(title="workers")
    for column in ("worker", "role", "running", "waiting", "relays", "KV use", "epoch", "lanes", ""):
        table.add_column(column, min_width=_WHOLE.get(column))
    for w in status.workers:
        s, info = w.stats, w.info
        used = f"{1 - s.free_blocks / max(1, s.total_blocks):.0%}" if s else "?"
        counts = (str(s.running), str(s.waiting)) if s else ("?", "?")
        relays = str(sum(bool(row.relayed_from) for row in w.requests)) if s else "?"
        epochs = ", ".join(agent.epoch for agent in info.agents) if info else "?"
        lanes = ", ".join(info.lanes) if info else "?"
        table.add_row(w.worker, w.role or "?", *counts, relays, used, epochs, lanes, condition(w))
    console.print(table)
    running = sorted(status.requests(), key=lambda pair: -pair[1].age_s)
    if not running:
        console.print("no request is running")
    elif requests:
        _requests(running[:requests], console)
    if len(running) > requests:
        console.print(f"{len(running) - requests} more requests; --requests {len(running)} shows them")
    if status.moves:
        show_moves(status.moves[-10:], console)


def condition(worker: WorkerReport) -> str:
    """What is special about a worker, as console markup."""
    found = ["draining" if worker.draining else "cordoned"] if worker.cordoned else []
    if worker.missing:
        found.append(f"[red]missing[/] ({escape(worker.missing)})")
    if worker.stats is not None and worker.age_s > _OLD_S:
        found.append(f"as of {worker.age_s:.0f} s ago")
    return ", ".join(found)


def _requests(running: Sequence[tuple[WorkerReport, RequestRow]], console: Console) -> None:
    table = Table(title="requests")
    for column in ("request", "worker", "phase", "prompt", "output", "age s", "moves", ""):
        table.add_column(column, min_width=_WHOLE.get(column))
    for worker, r in running:
        numbers = (str(r.prompt_tokens), str(r.output_tokens), f"{r.age_s:.1f}", str(r.moves))
        told = ["moving"] if r.moving else []
        told += [] if r.attached else ["nobody reads it"]
        told += [f"cannot move: {r.not_migratable}"] if r.not_migratable else []
        table.add_row(r.request_id, worker.worker, r.phase, *numbers, escape(", ".join(told)))
    console.print(table)


def outcome(move: MoveRecord) -> str:
    """What became of a move: code and reason of one that failed, or of one that was done in another mode."""
    why = ": ".join(text for text in (move.code, move.reason) if text)
    return ("done" + (f" ({why})" if why else "")) if move.ok else why or "failed"


def show_moves(moves: Sequence[MoveRecord], console: Console) -> None:
    """The table of migrations."""
    if not moves:
        console.print("nothing had to be moved")
        return
    table = Table(title="migrations")
    for column in ("request", "from", "to", "mode", "result", "downtime ms", "added stall ms", "rounds", "MB", "lane"):
        table.add_column(column, min_width=_WHOLE.get(column))
    for m in moves:
        numbers = (f"{m.downtime_s * 1e3:.1f}", f"{m.added_stall_s * 1e3:.1f}", str(m.rounds), f"{m.bytes / 1e6:.1f}")
        table.add_row(m.request_id, m.source, m.target, m.mode, escape(outcome(m)), *numbers, m.lane)
    console.print(table)


def migrate(
    request: Annotated[str, typer.Argument(help="request id as `dynamo status` shows it, or the start of it")],
    to: Annotated[
        str, typer.Option("--to", help="worker, or the start of its id; without it the one with most room")
    ] = "",
    mode: Annotated[Mode, typer.Option(help="how to move it")] = Mode.LIVE,
    json: Json = False,
) -> None:
    """Move a running request to another worker; exit code 1 when it stays, with the code and the reason.

    \b
    dynamo migrate 623266b7-b2d2-4a5e-9f0c-0b1a52ac5a11 --to 9e28ed1f
    dynamo migrate 6232 --to 9e28 --mode stop-and-copy
    dynamo migrate 6232
    """
    show = _json if json else (lambda record: show_moves([record], Console()))
    _run(lambda workers: workers.move(request, to, mode), show, lambda record: record.ok)


def drain(
    worker: Annotated[str, typer.Argument(help="worker, or the start of its id")],
    timeout: Annotated[float, typer.Option(min=0, help="seconds within which it is to be empty")] = 60.0,
    json: Json = False,
) -> None:
    """Give a worker no new requests, and move all that it has away; exit code 1 when some are left.

    \b
    dynamo drain 9e28ed1f
    dynamo drain 9e28 --timeout 300 --json
    """

    def show(drained: Drained) -> None:
        show_moves(drained.moves, Console())
        if drained.left:
            print(f"{drained.left} requests are left on worker {drained.worker}; dynamo status tells why they stay")

    _run(lambda workers: workers.drain(worker, timeout), _json if json else show, lambda drained: not drained.left)


def undrain(worker: Annotated[str, typer.Argument(help="worker, or the start of its id")]) -> None:
    """Let a drained worker have requests again.

    \b
    dynamo undrain 9e28ed1f
    """
    _run(lambda workers: workers.undrain(worker), lambda _: print(f"worker {worker} takes requests again"))
