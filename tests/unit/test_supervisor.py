# SPDX-License-Identifier: Apache-2.0
"""Processes are restarted; one that ends repeatedly ends the graph."""

from __future__ import annotations

import asyncio
import io
import os

import pytest
from rich.console import Console

from components.errors import MigrateError
from components.serve import supervisor
from components.serve.plan import Plan, Process
from components.serve.supervisor import Supervisor

CODE = "import os, pathlib, time; pathlib.Path(os.environ['DYN_MIGRATE_READY_FILE']).touch(); time.sleep(0.3)"


async def watch(limit: int) -> str:
    """What is printed while a process ends twice."""
    process = Process(component="Worker", replica=0, command=["python", "-c", CODE], environment={})
    output = io.StringIO()
    plan = Plan(namespace="test", transport="auto", model="m", processes=[process])
    watched = Supervisor(plan, os.environ, Console(file=output, width=200))
    running = asyncio.ensure_future(watched.run(restart_limit=limit))
    while output.getvalue().count("restart 1") + output.getvalue().count("restart 2") < 2 and not running.done():
        await asyncio.sleep(0.05)
    watched.stop()
    await running
    return output.getvalue()


async def test_one_that_ends_at_once_again_and_again_ends_the_graph() -> None:
    with pytest.raises(MigrateError, match="has ended 2 times"):
        await asyncio.wait_for(watch(limit=1), 60)


async def test_one_that_ran_for_a_while_starts_with_a_clean_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_STEADY_S", 0.0)
    told = await asyncio.wait_for(watch(limit=1), 60)
    assert told.count("restart 1 of 1") == 2


async def test_an_added_process_is_waited_for_and_ends_no_graph_with_it() -> None:
    def process(name: str, code: str) -> Process:
        return Process(component=name, replica=0, command=["python", "-c", code], environment={})

    plan = Plan(namespace="test", transport="auto", model="m", processes=[])
    watched, up = Supervisor(plan, os.environ, Console(file=io.StringIO())), asyncio.Event()
    running = asyncio.ensure_future(watched.run(up.set, restart_limit=0))
    async with asyncio.timeout(60):
        await up.wait()
        assert not await watched.serves(await watched.add(process("Broken", "raise SystemExit(1)")))
        page = await watched.add(process("Page", CODE.replace("0.3", "1000")))
        assert await watched.serves(page)
        assert [child.label for child in watched.children] == ["Page.0"] and not running.done()
        watched.stop()
        await running
    assert not page.alive
