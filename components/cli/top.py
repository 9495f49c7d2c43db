# SPDX-License-Identifier: Apache-2.0
"""``dynamo top``: workers, requests, migrations and the planner's decisions, once a second until Ctrl-C."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from rich.console import Console

from components.errors import MigrateError

_WIDTH = 120


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("top")(top)


def top(
    interval: Annotated[float, typer.Option(min=0.2, help="seconds between two looks")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="print one view and end")] = False,
) -> None:
    """Watch the running system: workers, KV use, queue, tokens/s, migrations, planner decisions.

    \b
    dynamo top
    dynamo top --once
    """
    import asyncio

    from components.serve.state import reach

    reach()
    code = 0
    try:
        asyncio.run(_watch(interval, once, _console()))
    except MigrateError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 0
    sys.stdout.flush()
    # Dynamo's native runtime may abort in the interpreter's finalisation.
    os._exit(code)


def _console() -> Console:
    console = Console()
    # A pipe has no width of its own.
    return console if console.is_terminal else Console(width=_WIDTH)


async def _watch(interval: float, once: bool, console: Console) -> None:
    import asyncio

    from rich.live import Live

    from components import process
    from components.client import Workers
    from components.dashboard.sample import Sampler
    from components.dashboard.top import view

    sampler = Sampler(await Workers.connect(process.connect(), process.namespace()), interval)
    await sampler.once()
    if once:
        # Rates need two samples.
        await asyncio.sleep(interval)
        await sampler.once()
        console.print(view(sampler.latest, sampler.history, sampler.error))
        return
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(view(sampler.latest, sampler.history, sampler.error), refresh=True)
            await asyncio.sleep(interval)
            await sampler.once()
