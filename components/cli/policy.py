# SPDX-License-Identifier: Apache-2.0
"""``dynamo policy explain``: what each policy would do now, or would have done with a saved snapshot."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from components.cli.formats import Format, Output, print_json
from components.errors import ConfigError
from components.wire import UNREADABLE

if TYPE_CHECKING:
    from planner_hooks.config import PolicyFile
    from planner_hooks.plan import Plan
    from planner_hooks.snapshot import Capture

app = typer.Typer(help="Policies that decide migrations.", no_args_is_help=True)


def register(parent: typer.Typer) -> None:
    """Add the commands."""
    parent.add_typer(app, name="policy")


@app.callback()
def policy() -> None:
    """Policies that decide migrations."""


@app.command("explain")
def explain(
    policy_file: Annotated[Path, typer.Option(help="policy file")] = Path("configs/policy.yaml"),
    snapshot: Annotated[Path | None, typer.Option(help="saved snapshot instead of the running system")] = None,
    save: Annotated[Path | None, typer.Option(help="write what was seen to this file")] = None,
    output: Output = Format.TABLE,
) -> None:
    """Show what every policy would move, and why it leaves the rest alone. Nothing is moved.

    \b
    dynamo policy explain
    dynamo policy explain --save now.json
    dynamo policy explain --snapshot now.json --policy-file my.yaml
    """
    import asyncio

    from planner_hooks.config import load
    from planner_hooks.snapshot import Snapshot

    rules = load(policy_file)
    capture = read(snapshot) if snapshot is not None else asyncio.run(observe(rules))
    if save is not None:
        save.write_bytes(msgspec.json.format(msgspec.json.encode(capture)))
    seen = Snapshot.of(capture, rules.controller.limits.stale_after_s)
    plans = {name: rules.build(name).plan(seen) for name, _, config in rules.policies if config.enabled}
    plans["all in order"] = rules.build().plan(seen)
    if output is Format.JSON:
        print_json(plans)
    else:
        show(capture, plans, Console())
    sys.stdout.flush()
    # Dynamo's native runtime may abort in the interpreter's finalisation.
    os._exit(0)


def read(path: Path) -> Capture:
    """A saved snapshot. Raises ``ConfigError``."""
    from planner_hooks.snapshot import Capture

    try:
        return msgspec.json.decode(path.read_bytes(), type=Capture)
    except OSError as error:
        raise ConfigError(f"snapshot: {error}") from error
    except UNREADABLE as error:
        raise ConfigError(f"{path} is no snapshot ({error}): write one with --save") from error


async def observe(rules: PolicyFile) -> Capture:
    """A snapshot of the running system."""
    from components import process
    from components.client import Workers
    from components.serve.state import reach
    from planner_hooks.observe import Observer

    reach()
    workers = await Workers.connect(process.connect(), process.namespace())
    await workers.refresh()
    return Observer(rules.controller.cost).capture(workers.status())


def show(capture: Capture, plans: dict[str, Plan], console: Console) -> None:
    """Tables for people."""
    table = Table(title="decode workers")
    for column in ("worker", "KV use", "running", "waiting", "step ms", ""):
        table.add_column(column)
    for view in capture.workers:
        used = f"{view.held_tokens / max(1, view.capacity_tokens):.0%}"
        counts = (str(view.running), str(view.waiting), f"{1e3 * view.step_s:.1f}")
        table.add_row(view.worker, used, *counts, "leaving" if view.draining else "")
    console.print(table)
    table = Table(title="decisions")
    for column in ("policy", "decision", "request", "from", "to", "gain s", "cost s", "why"):
        table.add_column(column)
    for name, plan in plans.items():
        for move in plan.moves:
            numbers = (f"{move.gain_s:.2f}", f"{move.cost_s:.2f}")
            table.add_row(name, f"move ({move.mode})", move.request_id, move.src, move.dst, *numbers, move.reason)
        for worker in plan.retire:
            table.add_row(name, "retire", "", worker, "", "", "", "")
        for hold in plan.holds:
            table.add_row(name, "leave", hold.request_id, hold.worker, "", "", "", f"{hold.reason} {hold.detail}")
    console.print(table)
