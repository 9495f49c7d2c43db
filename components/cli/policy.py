# SPDX-License-Identifier: Apache-2.0
"""``dynamo policy explain``: what each policy would do now, or would have done with a saved snapshot.

``dynamo policy simulate``: what a policy file gains on simulated workers under a trace.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console

from components.cli.formats import Format, Output, print_json
from components.dashboard.tables import decisions_table, id_length, table
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


@app.command("simulate")
def simulate(
    trace: Annotated[str, typer.Option(help="trace file: Mooncake, Azure or BurstGPT; burstgpt: load like its")],
    policy_file: Annotated[Path, typer.Option(help="policy file")] = Path("configs/policy.yaml"),
    workers: Annotated[int, typer.Option(min=2, help="aggregated workers")] = 8,
    load: Annotated[float, typer.Option(min=0.01, help="share of the rate at which they would be full")] = 0.7,
    seconds: Annotated[float, typer.Option(min=10, help="simulated time")] = 300.0,
    kv_tokens: Annotated[int, typer.Option(min=1000, help="KV of one worker")] = 800_000,
    restart: Annotated[bool, typer.Option("--restart", help="restart all workers, a tenth at a time")] = False,
    output: Output = Format.TABLE,
) -> None:
    """Simulate H200 workers with Llama-3.1-8B under Dynamo's KV routing, with and without a policy file.

    \b
    dynamo policy simulate --trace conversation_trace.jsonl
    dynamo policy simulate --trace AzureLLMInferenceTrace_conv.csv --workers 64 --load 0.85
    dynamo policy simulate --trace burstgpt --restart
    """
    from planner_hooks.config import load as load_policies
    from planner_hooks.simulate.scenario import Scenario, requests
    from planner_hooks.simulate.scenario import simulate as run
    from planner_hooks.simulate.upkeep import Ending

    file = load_policies(policy_file)
    scenario = Scenario(trace, workers, load, seconds, kv_tokens, restarts=restart)
    arrivals = requests(scenario)
    found = {"without": run(scenario, arrivals, ending=Ending.REPLAY), "with policies": run(scenario, arrivals, file)}
    if output is Format.JSON:
        print_json(found)
        return
    rows = table(f"{workers} workers, {len(arrivals):,} requests", ("", *found, "lower by"))
    for name in next(iter(found.values())).__struct_fields__:
        without, with_policies = (float(getattr(report, name)) for report in found.values())
        ratio = f"{without / with_policies:.2f}x" if without and with_policies and name.endswith("_ms") else ""
        rows.add_row(name.replace("_", " "), f"{without:,.2f}", f"{with_policies:,.2f}", ratio)
    Console().print(rows)
    if restart:
        Console().print("without: the frontend sends the requests of an ended worker to another one, which begins anew")


def read(path: Path) -> Capture:
    """A saved snapshot. Raises ``ConfigError``."""
    from planner_hooks.snapshot import Capture

    try:
        return msgspec.json.decode(path.read_bytes(), type=Capture)
    except OSError as error:
        raise ConfigError(f"snapshot {path} cannot be read: {error.strerror}; write one with --save") from error
    except UNREADABLE as error:
        raise ConfigError(f"{path} is no snapshot ({error}): write one with --save") from error


async def observe(rules: PolicyFile) -> Capture:
    """A snapshot of the running system."""
    from components import process
    from components.serve.state import reach
    from planner_hooks.observe import Observer
    from planner_hooks.table import Tables

    reach()
    workers = await Tables.connect(process.connect(), process.namespace())
    await workers.refresh()
    observer = Observer(rules.controller.cost)
    return observer.capture(observer.look(workers.tables(), workers.moves()))


def show(capture: Capture, plans: dict[str, Plan], out: Console) -> None:
    """Tables for people."""
    from planner_hooks.report import decisions

    workers = table("decode workers", ("worker", "KV use", "running", "waiting", "step ms", ""))
    for view in capture.workers:
        used = f"{view.held_tokens / max(1, view.capacity_tokens):.0%}"
        counts = (str(view.running), str(view.waiting), f"{1e3 * view.step_s:.1f}")
        workers.add_row(view.worker, used, *counts, "leaving" if view.draining else "")
    out.print(workers)
    for name, plan in plans.items():
        length = id_length(move.request_id for move in plan.moves)
        out.print(decisions_table(f"\n{name}", decisions(plan), length))
