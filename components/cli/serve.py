# SPDX-License-Identifier: Apache-2.0
"""``dynamo serve`` and ``dynamo demo``."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from components.transfer.config import Transport

if TYPE_CHECKING:
    from components.cli.launcher import Then
    from components.serve.plan import Plan

_DEMO = "graphs.disagg:Frontend"
_EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}
Graph = Annotated[str, typer.Argument(help="graph and entry, e.g. graphs.disagg:Frontend")]
Config = Annotated[Path | None, typer.Option("-f", "--config-file", help="YAML: component names and their keys")]
NixlTransport = Annotated[Transport, typer.Option("--nixl-transport", help="lane that KV blocks take")]
Page = Annotated[
    int | None,
    typer.Option("--dashboard", min=0, max=65535, help="port of the web page; 0: none; default: next free"),
]
Port = Annotated[
    int | None,
    typer.Option("-p", "--port", min=1, max=65535, help="HTTP port of the frontend; default: Frontend.port, else 8000"),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("serve", context_settings=_EXTRA)(serve)
    app.command("demo", context_settings=_EXTRA)(demo)


def resolve(
    graph: str, config: Path | None, transport: Transport, port: int | None, only: str, arguments: list[str]
) -> Plan:
    """The plan for the command line's arguments, with models prepared."""
    from components import env, models
    from components.serve.graph import load
    from components.serve.plan import make_plan, parse_overrides, read_yaml

    env.check()
    values = read_yaml(config) if config else {}
    overrides = parse_overrides(arguments)
    if port is not None:
        overrides.setdefault("Frontend", {})["port"] = port
    for name, block in overrides.items():
        if "model" in block:
            # A model that is not served need not exist.
            for lost in values.values() if name == "Common" else [values.get(name, {})]:
                lost.pop("model", None)
    if "model" not in {**values.get("Common", {}), **overrides.get("Common", {})}:
        values.setdefault("Common", {})["model"] = "smollm2"
    names_of_models: dict[str, str] = {}
    for block in (*values.values(), *overrides.values()):
        if isinstance(asked := block.get("model"), str):
            block["model"] = models.resolve(str(asked))
            names_of_models[block["model"]] = str(asked)
    names = [name.strip() for name in only.split(",") if name.strip()]
    return make_plan(load(graph), values, overrides, transport, os.environ, names or None, names_of_models)


def serve(
    context: typer.Context,
    graph: Graph,
    config: Config = None,
    nixl_transport: NixlTransport = Transport.AUTO,
    port: Port = None,
    dashboard: Page = None,
    only: Annotated[str, typer.Option(help="start only these components, joined by commas")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan as JSON and start nothing")] = False,
) -> None:
    """Start a graph and keep it running until Ctrl-C. --Component.key=value wins over the file.

    \b
    dynamo serve graphs.disagg:Frontend -f configs/disagg.yaml
    dynamo serve graphs.disagg:Frontend -f configs/disagg.yaml --nixl-transport shm --DecodeWorker.replicas=3
    dynamo serve graphs.disagg:Frontend -f configs/disagg.yaml --dry-run
    dynamo serve graphs.planner:Frontend -f configs/planner.yaml --port 9000

    Components and their keys are in the file's comments and in docs/reference.md; an unknown one is an error.
    """
    plan = resolve(graph, config, nixl_transport, port, only, context.args)
    if dry_run:
        print(plan.shown())
        return
    _run(plan, Console(soft_wrap=True), None, dashboard)


def _run(plan: Plan, console: Console, then: Then | None, dashboard: int | None) -> None:
    import asyncio

    from components.cli.launcher import Launcher

    asyncio.run(Launcher(plan, console, dashboard).run(then))
    if plan.bounds:
        # Dynamo's native runtime may abort in the interpreter's finalisation.
        sys.stdout.flush()
        os._exit(0)


def demo(
    context: typer.Context,
    graph: Annotated[str, typer.Argument(help="graph and entry")] = _DEMO,
    config: Config = Path("configs/disagg.yaml"),
    nixl_transport: NixlTransport = Transport.AUTO,
    port: Port = None,
    dashboard: Page = None,
    once: Annotated[bool, typer.Option("--once", help="stop after the first answer")] = False,
) -> None:
    """Start a graph, send one chat request, show its text and timing, then keep serving.

    \b
    dynamo demo
    dynamo demo --once --Common.model=tiny-llama
    """
    # Warnings of vLLM and Dynamo do not help a newcomer; ``dynamo serve`` shows them.
    for name, value in {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "DYN_LOG": "error,mm_routing=off",
        "PYTHONWARNINGS": "ignore",
    }.items():
        os.environ.setdefault(name, value)
    overrides = context.args
    if graph.startswith("--"):
        # An unknown option takes the place of an omitted argument.
        graph, overrides = _DEMO, [graph, *overrides]
    plan = resolve(graph, config, nixl_transport, port, "", overrides)
    console = Console(soft_wrap=True)

    async def first_request() -> bool:
        await chat(plan, console)
        return once

    _run(plan, console, first_request, dashboard)


async def chat(plan: Plan, console: Console) -> None:
    """One streaming request; prints text, TTFT and TPOT as vLLM defines them."""
    import json
    import statistics

    import httpx

    url = f"{plan.url}/v1/chat/completions"
    body = {
        "model": plan.model,
        "messages": [{"role": "user", "content": "Name three things that a good cup of tea needs."}],
        "max_tokens": 64,
        "temperature": 0,
        "stream": True,
    }
    began, times = time.perf_counter(), []
    async with (
        httpx.AsyncClient(timeout=120, trust_env=False) as client,
        client.stream("POST", url, json=body) as reply,
    ):
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            choices = json.loads(line.removeprefix("data: ")).get("choices") or [{}]
            text = choices[0].get("delta", {}).get("content")
            if text:
                times.append(time.perf_counter())
                console.print(text, end="", style="bold", soft_wrap=True, markup=False, highlight=False)
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    console.print(
        f"\nTTFT {1e3 * (times[0] - began):.0f} ms, TPOT {1e3 * statistics.fmean(gaps or [0]):.1f} ms "
        f"(mean of {len(gaps)} gaps)\nmore: curl -N {url} -H 'content-type: application/json' -d '{json.dumps(body)}'"
    )
