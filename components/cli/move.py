# SPDX-License-Identifier: Apache-2.0
"""``dynamo status``, ``dynamo migrate`` and ``dynamo drain``."""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, TypeVar

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from components import process
from components.cli.live import nobody_answers, reach
from components.errors import MigrateError, RequestNotFound
from components.messages import Mode, MoveRecord, RouterReply
from components.router.client import RouterClient

T = TypeVar("T")
_WHOLE = {"worker": 8, "from": 8, "to": 8, "request": 36}
"""Ids are arguments of other commands: a narrow terminal must not cut them."""
Json = Annotated[bool, typer.Option("--json", help="machine-readable output")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("status")(status)
    app.command("migrate")(migrate)
    app.command("drain")(drain)
    app.command("undrain")(undrain)


def _run(
    work: Callable[[RouterClient], Awaitable[T]], show: Callable[[T], None], well: Callable[[T], bool] = lambda _: True
) -> None:
    """Ask the router, show its answer, and end: with 0, with 1 when it is not ``well``, with 2 after an error."""
    import asyncio

    async def main() -> T:
        client = RouterClient(process.connect())
        await asyncio.wait_for(client.connect(), 10)
        return await work(client)

    reach()
    try:
        answer = asyncio.run(main())
        show(answer)
    except TimeoutError:
        print(f"error: {nobody_answers(process.namespace())}", file=sys.stderr)
        os._exit(2)
    except MigrateError as error:
        print(f"error: {error}", file=sys.stderr)
        os._exit(2)
    sys.stdout.flush()
    # Dynamo's native runtime may abort in the interpreter's finalisation.
    os._exit(0 if well(answer) else 1)


def _json(value: object) -> None:
    print(msgspec.json.format(msgspec.json.encode(value)).decode())


def status(json: Json = False) -> None:
    """Show workers, running requests and the last migrations.

    \b
    dynamo status
    dynamo status --json
    """
    _run(lambda client: client.status(), _json if json else _tables)


def _tables(reply: RouterReply) -> None:
    console = Console()
    table = Table(title="workers")
    for column in ("worker", "role", "running", "waiting", "KV use", "epoch", "lanes", ""):
        table.add_column(column, min_width=_WHOLE.get(column))
    for w in reply.workers:
        s = w.stats
        used = f"{1 - s.free_blocks / max(1, s.total_blocks):.0%}" if s else "?"
        epoch = ", ".join(w.epochs)
        counts = (str(s.running), str(s.waiting)) if s else ("?", "?")
        table.add_row(w.worker, w.role, *counts, used, epoch, ", ".join(w.lanes), "draining" if w.draining else "")
    console.print(table)
    if reply.streams:
        _streams(reply, console)
    else:
        console.print("no request is running")
    if reply.moves:
        _moves(list(reply.moves[-10:]))


def _streams(reply: RouterReply, console: Console) -> None:
    table = Table(title="requests")
    for column in ("request", "worker", "prompt", "output", "age s", "moves", "replays"):
        table.add_column(column, min_width=_WHOLE.get(column))
    for r in reply.streams:
        numbers = (str(r.prompt_tokens), str(r.output_tokens), f"{r.age_s:.1f}", str(r.moves), str(r.replays))
        table.add_row(r.request_id, r.worker, *numbers)
    console.print(table)


def _moves(moves: list[MoveRecord]) -> None:
    if not moves:
        Console().print("nothing had to be moved")
        return
    table = Table(title="migrations")
    for column in ("request", "from", "to", "mode", "result", "downtime ms", "added stall ms", "rounds", "MB", "lane"):
        table.add_column(column, min_width=_WHOLE.get(column))
    for m in moves:
        result = "done" if m.ok else m.reason
        numbers = (f"{m.downtime_s * 1e3:.1f}", f"{m.added_stall_s * 1e3:.1f}", str(m.rounds), f"{m.bytes / 1e6:.1f}")
        table.add_row(m.request_id, m.source, m.target, m.mode, result, *numbers, m.lane)
    Console().print(table)


def migrate(
    request: Annotated[str, typer.Argument(help="request id as `dynamo status` shows it, or the start of it")],
    to: Annotated[str, typer.Option("--to", help="worker, or the start of its id")],
    mode: Annotated[Mode, typer.Option(help="how to move it")] = Mode.LIVE,
    json: Json = False,
) -> None:
    """Move a running request to another decode worker; exit code 1 when it stays, with the reason.

    \b
    dynamo migrate 623266b7-b2d2-4a5e-9f0c-0b1a52ac5a11 --to 9e28ed1f
    dynamo migrate 6232 --to 9e28 --mode stop-and-copy
    """
    show = _json if json else (lambda record: _moves([record]))

    async def move(client: RouterClient) -> MoveRecord:
        running = [stream.request_id for stream in (await client.status()).streams]
        return await client.migrate(whole(request, running), to, mode)

    _run(move, show, lambda record: record.ok)


def whole(request: str, running: Sequence[str]) -> str:
    """The one running request that begins so. Raises ``RequestNotFound``."""
    found = [request_id for request_id in running if request_id.startswith(request)]
    if len(found) != 1:
        among = ", ".join((found or list(running))[:5]) or "none"
        raise RequestNotFound(
            f"{len(found) or 'no'} running requests begin with {request!r}: dynamo status; running: {among}"
        )
    return found[0]


def drain(
    worker: Annotated[str, typer.Argument(help="worker, or the start of its id")],
    timeout: Annotated[
        float, typer.Option(min=0, help="seconds after which it is an error that requests are left")
    ] = 60.0,
    json: Json = False,
) -> None:
    """Move every request away from a worker and give it no new ones.

    \b
    dynamo drain 9e28ed1f
    dynamo drain 9e28 --timeout 300 --json
    """
    _run(lambda client: client.drain(worker, timeout), _json if json else _moves)


def undrain(worker: Annotated[str, typer.Argument(help="worker, or the start of its id")]) -> None:
    """Let a drained worker have requests again: dynamo undrain 9e28ed1f"""
    _run(lambda client: client.undrain(worker), lambda _: print(f"worker {worker} takes requests again"))
