# SPDX-License-Identifier: Apache-2.0
"""``dynamo status``, ``dynamo top``, ``dynamo migrate``, ``dynamo drain`` and ``dynamo undrain``."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console

from components.cli.formats import Format, Output, print_json
from components.dashboard.tables import console, show_moves, show_status
from components.errors import MigrateError
from components.migration.messages import Mode
from components.status import Status

if TYPE_CHECKING:
    from components.client import Drained, Workers

T = TypeVar("T")
_PIPE = 120
"""Width of ``dynamo top`` in a pipe, which has none of its own."""
Wide = Annotated[bool, typer.Option("--wide", help="whole ids and all columns, however wide they are")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("status")(status)
    app.command("migrate")(migrate)
    app.command("drain")(drain)
    app.command("undrain")(undrain)
    app.command("top")(top)


def _run(
    work: Callable[[Workers], Awaitable[T]],
    show: Callable[[T], None],
    well: Callable[[T], bool] = lambda _: True,
    interrupted: int = 130,
) -> None:
    """Call the workers, show the answer, and exit: 0, or 1 when the answer is not ``well``, or 2 after an error.

    ``interrupted``: the exit code after Ctrl-C.
    """
    import asyncio

    from components import process
    from components.client import Workers
    from components.serve.state import reach

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
    except KeyboardInterrupt:
        os._exit(interrupted)
    sys.stdout.flush()
    # Dynamo's native runtime may abort in the interpreter's finalisation.
    os._exit(0 if well(answer) else 1)


def status(
    requests: Annotated[int, typer.Option(min=0, help="how many requests to show, the oldest first")] = 50,
    wide: Wide = False,
    output: Output = Format.TABLE,
) -> None:
    """Show workers, running requests and the last migrations. A worker that does not answer is shown as missing.

    \b
    dynamo status
    dynamo status --requests 0
    dynamo status --wide
    dynamo status -o json
    """

    async def known(workers: Workers) -> Status:
        return workers.status()

    text = output is Format.JSON
    _run(known, print_json if text else (lambda found: show_status(found, requests, console(wide), wide)))


def migrate(
    request: Annotated[str, typer.Argument(help="request id as `dynamo status` shows it, or the start of it")],
    to: Annotated[
        str, typer.Option("--to", help="worker, or the start of its id; without it the one with most room")
    ] = "",
    mode: Annotated[Mode, typer.Option(help="how to move it")] = Mode.LIVE,
    wide: Wide = False,
    output: Output = Format.TABLE,
) -> None:
    """Move a running request to another worker; exit code 1 when it stays, with the code and the reason.

    \b
    dynamo migrate 623266b7-b2d2-4a5e-9f0c-0b1a52ac5a11 --to 9e28ed1f
    dynamo migrate 6232 --to 9e28 --mode stop-and-copy
    dynamo migrate 6232
    """
    show = print_json if output is Format.JSON else (lambda record: show_moves([record], console(wide), wide))
    _run(lambda workers: workers.move(request, to, mode), show, lambda record: record.ok)


def drain(
    worker: Annotated[str, typer.Argument(help="worker, or the start of its id")],
    timeout: Annotated[float, typer.Option(min=0, help="seconds within which it is to be empty")] = 60.0,
    wide: Wide = False,
    output: Output = Format.TABLE,
) -> None:
    """Give a worker no new requests, and move all that it has away; exit code 1 when some are left.

    \b
    dynamo drain 9e28ed1f
    dynamo drain 9e28 --timeout 300 -o json
    """

    def show(drained: Drained) -> None:
        show_moves(drained.moves, console(wide), wide)
        if drained.left:
            print(f"{drained.left} requests are left on worker {drained.worker}; dynamo status tells why they stay")

    told = print_json if output is Format.JSON else show
    _run(lambda workers: workers.drain(worker, timeout), told, lambda drained: not drained.left)


def undrain(worker: Annotated[str, typer.Argument(help="worker, or the start of its id")]) -> None:
    """Let a drained worker have requests again.

    \b
    dynamo undrain 9e28ed1f
    """
    _run(lambda workers: workers.undrain(worker), lambda _: print(f"worker {worker} takes requests again"))


def top(
    interval: Annotated[float, typer.Option(min=0.2, help="seconds between two looks")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="print one view and end")] = False,
) -> None:
    """Watch the running system until Ctrl-C: workers, KV use, queue, tokens/s, migrations, planner decisions.

    \b
    dynamo top
    dynamo top --once
    """
    import asyncio

    from rich.live import Live

    from components.dashboard.sample import Sampler
    from components.dashboard.top import view

    out = console()
    if not out.is_terminal:
        out = Console(width=_PIPE)

    async def watch(workers: Workers) -> None:
        sampler = Sampler(workers, interval)
        await sampler.once()
        with contextlib.nullcontext() if once else Live(console=out, screen=True, auto_refresh=False) as live:
            while True:
                if live is not None:
                    live.update(view(sampler.latest, sampler.history, sampler.error), refresh=True)
                await asyncio.sleep(interval)
                await sampler.once()  # Rates need two samples.
                if live is None:
                    return out.print(view(sampler.latest, sampler.history, sampler.error))

    _run(watch, lambda _: None, interrupted=0)
