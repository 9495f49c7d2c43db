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
import contextlib
import itertools
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx
import psutil
from rich.console import Console
from rich.text import Text

from components import env
from components.errors import ConfigError, MigrateError
from components.serve import family
from components.serve.arguments import filled
from components.serve.plan import Plan, Process
from components.serve.servers import free_port
from components.serve.surroundings import is_noise
from components.serve.warden import Warden

READY_S = 300.0
_STEADY_S = 60.0
"""Uptime after which the restart count is reset."""
_POLL_S = 0.05
_COLOURS = itertools.cycle(["cyan", "green", "magenta", "yellow", "blue", "bright_red"])


class Child:
    """One process of the plan, across its restarts."""

    def __init__(self, process: Process, directory: Path, console: Console, warden: Warden | None = None) -> None:
        self.process = process
        self.label = f"{process.component}.{process.replica}"
        self.ready_file = directory / f"{self.label}.ready"
        self.handle: asyncio.subprocess.Process | None = None
        self.restarts = 0
        """Failures in a row; reset after ``_STEADY_S``."""
        self.started = 0.0
        self.optional = False
        """Started later for the planner; its failure does not end the graph."""
        self._console = console
        self._warden = warden
        self._starting: asyncio.Future[None] | None = None
        self._colour = next(_COLOURS)

    async def start(self, environment: Mapping[str, str]) -> None:
        """Start it; prints its output line by line after its name. ``stop`` may be called while this waits."""
        self._starting = asyncio.ensure_future(self._start(environment))
        await asyncio.shield(self._starting)

    async def _start(self, environment: Mapping[str, str]) -> None:
        self.ready_file.unlink(missing_ok=True)
        self.started = time.monotonic()
        own = {"DYN_MIGRATE_READY_FILE": str(self.ready_file), "PYTHONUNBUFFERED": "1"}
        socket = f"{env.SOCKETS.read(environment) or tempfile.gettempdir()}/{secrets.token_hex(8)}"
        command, planned = filled(self.process.command[1:], self.process.environment, socket)
        self.handle = await asyncio.create_subprocess_exec(
            *family.tied([sys.executable, *command]),
            env={
                **environment,
                "DYN_SYSTEM_PORT": str(free_port()),
                **planned,
                **own,
            },
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            limit=1 << 20,
        )
        if self._warden is not None:
            self._warden.cover(self.handle.pid)
        asyncio.ensure_future(self._print(self.handle, environment))

    async def _print(self, handle: asyncio.subprocess.Process, environment: Mapping[str, str]) -> None:
        if handle.stdout is None:
            return
        with contextlib.suppress(ValueError):
            async for line in handle.stdout:
                if is_noise(line, environment):
                    continue
                bar = "│" if self._console.encoding.startswith("utf") else "|"
                text = Text(f"{self.label:>16} {bar} ", style=self._colour)
                self._console.print(
                    text.append(line.decode(errors="replace").rstrip(), style="default"), soft_wrap=True
                )

    @property
    def alive(self) -> bool:
        """True while the process runs."""
        return self.handle is not None and self.handle.returncode is None

    async def ended(self) -> int:
        """Wait for its end and remove what it leaves. Returns its exit code."""
        if self.handle is None:
            return 0
        await self._exit()
        await self._clear(self.handle.pid)
        return self.handle.returncode or 0

    async def _exit(self) -> None:
        # asyncio's ``wait`` also waits for the end of the pipe, which children of the process hold.
        while self.alive:
            await asyncio.sleep(_POLL_S)

    async def stop(self) -> None:
        """Send SIGTERM, wait for the plan's time, then kill everything that it has started."""
        if self._starting is not None:
            await asyncio.wait([self._starting])
        if self.handle is None:
            return
        elsewhere = self._elsewhere(self.handle.pid)
        if self.alive:
            self.handle.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._exit(), self.process.stop_s)
        await self._clear(self.handle.pid)
        for member in elsewhere:
            with contextlib.suppress(psutil.Error):
                if member.is_running():
                    member.kill()

    async def _clear(self, session: int) -> None:
        await family.end([session])
        if self._warden is not None:
            self._warden.release(session)

    @staticmethod
    def _elsewhere(pid: int) -> list[psutil.Process]:
        """Its descendants that have left its session."""
        found = []
        with contextlib.suppress(psutil.Error):
            for member in psutil.Process(pid).children(recursive=True):
                with contextlib.suppress(ProcessLookupError):
                    if os.getsid(member.pid) != pid:
                        found.append(member)
        return found


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
