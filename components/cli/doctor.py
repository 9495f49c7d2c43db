# SPDX-License-Identifier: Apache-2.0
"""``dynamo doctor``: checks this machine, with a fix for each failure."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from components.cli.formats import Format, Output, print_json
from components.dashboard.tables import table
from components.doctor.check import Check, State
from components.transfer.config import Transport

_STYLE = {State.OK: "green", State.SKIP: "dim", State.WARN: "yellow", State.FAIL: "bold red"}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("doctor")(doctor)


def doctor(
    transport: Annotated[Transport, typer.Option("--nixl-transport", help="lane to test")] = Transport.AUTO,
    port: Annotated[int, typer.Option("-p", "--port", min=1, max=65535, help="HTTP port that must be free")] = 8000,
    quick: Annotated[bool, typer.Option("--quick", help="leave the test transfer out")] = False,
    output: Output = Format.TABLE,
) -> None:
    """Check this machine and installation; exit code 1 when something will not work.

    \b
    dynamo doctor
    dynamo doctor --nixl-transport ib
    dynamo doctor --quick -o json
    """
    checks = look(transport, port, quick)
    if output is Format.JSON:
        print_json(checks)
    else:
        show(checks, Console())
    sys.stdout.flush()
    # NIXL's native library may abort in the interpreter's finalisation.
    os._exit(int(any(check.state is State.FAIL for check in checks)))


def look(transport: Transport, port: int, quick: bool) -> list[Check]:
    """All checks, in the order of repair."""
    from components.doctor import host, judge, places, services, transfer

    facts = host.gather()
    checks = judge.judge(facts, transport) + places.places(os.environ) + services.services(os.environ, port)
    if not quick and not facts.nixl_error:
        checks.append(transfer.transfer(transport))
    return checks


def show(checks: list[Check], console: Console) -> None:
    """A table for people, with the fix of each warning and failure below what was found."""
    rows = table("", ("check", "", "found"), folded="found")
    for check in checks:
        found = escape(check.found) + (f"\n[bold]fix:[/] {escape(check.fix)}" if check.fix else "")
        rows.add_row(check.name, f"[{_STYLE[check.state]}]{check.state}[/]", found)
    console.print(rows)
    bad = sum(check.state is State.FAIL for check in checks)
    console.print(f"[bold red]failed checks: {bad}[/]" if bad else "[bold green]ready[/]")
