# SPDX-License-Identifier: Apache-2.0
"""Runs the processes of a plan: starts them in order, watches, restarts with back-off, stops in reverse.

Life cycle: ``run`` returns after ``stop``, or when a process has failed too often. Every process leads its own session
(``components.serve.family``): everything that it started (vLLM's engine core) is gone before its successor starts.
One task watches each process, so that one that ends repeatedly delays no other.
Threading: one asyncio loop, in the main thread. Time-outs: a process must be ready within ``READY_S``; the plan has the
time for which a stopped one may drain.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx
from rich.console import Console

from components.errors import ConfigError, MigrateError
from components.serve.child import Child
from components.serve.plan import Plan, Process
from components.serve.warden import Warden

READY_S = 300.0
_STEADY_S = 60.0
"""Uptime after which the restart count is reset."""


class Supervisor:
    """See the module docstring. ``environment`` is common to all processes; the plan adds variables to each."""

    def __init__(
        self,
        plan: Plan,
        environment: Mapping[str, str],
        console: Console,
        warden: Warden | None = None,
    ) -> None:
        self._plan = plan
        self._environment = environment
        self._console = console
        self._warden = warden
        self._directory = tempfile.TemporaryDirectory(prefix="dynamo-migrate-run-")
        if warden is not None:
            warden.keep_clean(Path(self._directory.name))
        self._stop = asyncio.Event()
        self._given_up: MigrateError | None = None
        self._watching: dict[Child, asyncio.Task[None]] = {}
        self._leaving: list[Child] = []
        self.children = [self._child(p) for p in plan.processes]

    def _child(self, process: Process) -> Child:
        return Child(process, Path(self._directory.name), self._console, self._warden)

    async def add(self, process: Process) -> Child:
        """Start another process and watch it; the graph does not end with it."""
        if self._stop.is_set():
            raise MigrateError(f"{process.component}.{process.replica} is not started: the graph is stopping")
        child = self._child(process)
        child.optional = True
        await child.start(self._environment)
        self._say(child, "starting")
        self.children.append(child)
        self._watch(child)
        return child

    async def serves(self, child: Child) -> bool:
        """Wait until a process that was added is ready. False when it has been given up, or takes too long."""
        until = time.monotonic() + READY_S
        while child in self.children and not child.ready_file.exists() and time.monotonic() < until:
            await asyncio.sleep(0.1)
        return child in self.children and child.ready_file.exists()

    async def remove(self, child: Child) -> None:
        """Stop one process for good; a worker drains first."""
        self.children.remove(child)
        self._leaving.append(child)
        await self._watch_no_more(child)
        self._say(child, "stopping")
        await child.stop()
        self._leaving.remove(child)

    def stop(self) -> None:
        """End everything. May be called from a signal handler."""
        self._stop.set()

    async def run(self, on_ready: Callable[[], None] | None = None, restart_limit: int = 5) -> None:
        """Start, watch and stop. Raises ``MigrateError`` when a component cannot be kept running."""
        self._limit = restart_limit
        try:
            await self._start_all()
            if on_ready is not None and not self._stop.is_set():
                on_ready()
            await self._stop.wait()
            if self._given_up is not None:
                raise self._given_up
        finally:
            self._stop.set()
            for child in list(self._watching):
                await self._watch_no_more(child)
            for child in reversed(self.children):
                if child.process.port:
                    await child.stop()
            left = [*self._leaving, *reversed(self.children)]
            await asyncio.gather(*(child.stop() for child in left))
            self._directory.cleanup()

    async def _start_all(self) -> None:
        """Start all: workers load their models in parallel; frontends wait for them."""
        began = time.monotonic()
        for child in self.children:
            await child.start(self._environment)
            self._say(child, "starting")
        waiting = list(self.children)
        # One client for all checks: making one takes longer than the pause between two.
        async with httpx.AsyncClient(timeout=2.0, trust_env=False) as client:
            while waiting and not self._stop.is_set():
                for child in list(waiting):
                    if not child.alive:
                        code = child.handle.returncode if child.handle else None
                        raise ConfigError(
                            f"{child.label} ended with code {code} before it was ready; its reason is above"
                        )
                    if await self._is_ready(child, client):
                        self._say(child, f"ready after {time.monotonic() - began:.0f} s")
                        waiting.remove(child)
                        self._watch(child)
                if time.monotonic() - began > READY_S:
                    raise MigrateError(f"not ready within {READY_S:g} s: {', '.join(c.label for c in waiting)}")
                await asyncio.sleep(0.1)

    async def _is_ready(self, child: Child, client: httpx.AsyncClient) -> bool:
        if not child.process.port:
            return child.ready_file.exists()
        try:
            reply = await client.get(f"{self._plan.url_of(child.process.port)}/v1/models")
            return bool(reply.json().get("data"))
        except (httpx.HTTPError, ValueError):
            return False

    def _watch(self, child: Child) -> None:
        self._watching[child] = task = asyncio.ensure_future(self._keep(child))
        task.add_done_callback(self._watched)

    def _watched(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._end_with(MigrateError(f"a process cannot be watched: {type(error).__name__}: {error}"))

    def _end_with(self, error: MigrateError) -> None:
        self._given_up = self._given_up or error
        self._stop.set()

    async def _watch_no_more(self, child: Child) -> None:
        task = self._watching.pop(child, None)
        if task is not None and task is not asyncio.current_task():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _keep(self, child: Child) -> None:
        """Restart it after each end, until it has ended too often."""
        while True:
            code = await child.ended()
            if time.monotonic() - child.started > _STEADY_S:
                child.restarts = 0
            child.restarts += 1
            if child.restarts > self._limit:
                self._give_up(child)
                return
            delay = min(30.0, 0.5 * 2**child.restarts)
            self._say(child, f"ended with code {code}; restart {child.restarts} of {self._limit} in {delay:g} s")
            await asyncio.sleep(delay)
            await child.start(self._environment)

    def _give_up(self, child: Child) -> None:
        if child.optional:
            self.children.remove(child)
            self._watching.pop(child, None)
            self._say(child, f"has ended {child.restarts} times; going on without it")
            return
        self._end_with(MigrateError(f"{child.label} has ended {child.restarts} times; giving up"))

    def _say(self, child: Child, what: str) -> None:
        self._console.print(f"[bold]{child.label:>16}[/] {what}")
