# SPDX-License-Identifier: Apache-2.0
"""Runs the processes of a plan: start in order, watch, restart with back-off, stop in reverse.

Life cycle: ``run`` returns when ``stop`` is called or a process has failed too often. Every process has a
session of its own, so that its children (vLLM's engine core) end with it. Threading: one asyncio loop.
Time-outs: a process must be ready within ``READY_S``; a stopped one may drain for its grace period.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
from rich.console import Console
from rich.text import Text

from components.address import dialled
from components.errors import ConfigError, MigrateError
from components.serve.plan import Plan, Process
from components.serve.servers import system_port

READY_S = 300.0
_STEADY_S = 60.0
"""A process that ran for so long has recovered: a graph must not end at the sixth crash of its life."""
_COLOURS = itertools.cycle(["cyan", "green", "magenta", "yellow", "blue", "bright_red"])


class Child:
    """One running process of the plan."""

    def __init__(self, process: Process, directory: Path, console: Console) -> None:
        self.process = process
        self.label = f"{process.component}.{process.replica}"
        self.ready_file = directory / f"{self.label}.ready"
        self.handle: asyncio.subprocess.Process | None = None
        self.restarts = 0
        """In a row: forgotten once it has run for a while."""
        self.started = 0.0
        self.optional = False
        """Started later by the planner's wish: the graph goes on without it."""
        self._console = console
        self._colour = next(_COLOURS)

    async def start(self, environment: dict[str, str]) -> None:
        """Start it; its output is printed line by line behind its name."""
        self.ready_file.unlink(missing_ok=True)
        self.started = time.monotonic()
        self.handle = await asyncio.create_subprocess_exec(
            sys.executable,
            *self.process.command[1:],
            env=environment
            | self.process.environment
            | {"DYN_MIGRATE_READY_FILE": str(self.ready_file), "PYTHONUNBUFFERED": "1"},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            limit=1 << 20,
        )
        asyncio.ensure_future(self._print(self.handle))

    async def _print(self, handle: asyncio.subprocess.Process) -> None:
        if handle.stdout is None:
            return
        with contextlib.suppress(ValueError):
            async for line in handle.stdout:
                text = Text(f"{self.label:>16} │ ", style=self._colour)
                self._console.print(
                    text.append(line.decode(errors="replace").rstrip(), style="default"), soft_wrap=True
                )

    @property
    def alive(self) -> bool:
        """Is the process running?"""
        return self.handle is not None and self.handle.returncode is None

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, wait, then kill everything in its session."""
        if self.handle is None:
            return
        family = self._family()
        if self.alive:
            self.handle.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.handle.wait(), grace_s)
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                if member.is_running():
                    member.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.handle.pid, signal.SIGKILL)
        await self.handle.wait()

    def _family(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            if self.handle is not None:
                return list(psutil.Process(self.handle.pid).children(recursive=True))
        return []


class Supervisor:
    """See the module docstring."""

    def __init__(self, plan: Plan, servers: dict[str, str], console: Console, grace_s: float = 90.0) -> None:
        self._plan = plan
        self._environment = dict(os.environ) | servers | {"PYTHONHASHSEED": "0"}
        # The second part: a text model "is not supported" by the routing of images.
        self._environment.setdefault("DYN_LOG", "warn,mm_routing=off")
        self._environment.setdefault("NIXL_LOG_LEVEL", "WARN")
        self._environment.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        self._console = console
        self._grace_s = grace_s
        self._directory = tempfile.TemporaryDirectory(prefix="dynamo-migrate-run-")
        self._stop = asyncio.Event()
        self._leaving: list[Child] = []
        self.children = [Child(p, Path(self._directory.name), console) for p in plan.processes]

    async def add(self, process: Process) -> Child:
        """Start another process; it is watched like the others, but the graph does not end with it."""
        if self._stop.is_set():
            raise MigrateError(f"{process.component}.{process.replica} is not started: the graph is stopping")
        child = Child(process, Path(self._directory.name), self._console)
        child.optional = True
        await child.start(self._environment | {"DYN_SYSTEM_PORT": str(system_port())})
        self._say(child, "starting")
        self.children.append(child)
        return child

    async def remove(self, child: Child) -> None:
        """Stop one process for good; it may drain for the grace period."""
        self.children.remove(child)
        self._leaving.append(child)
        self._say(child, "stopping")
        await child.stop(self._grace_s)
        self._leaving.remove(child)

    def stop(self) -> None:
        """End everything. May be called from a signal handler."""
        self._stop.set()

    async def run(self, on_ready: Callable[[], None] | None = None, restart_limit: int = 5) -> None:
        """Start, watch, stop. Raises ``MigrateError`` when a component cannot be kept running."""
        try:
            await self._start_all()
            if on_ready is not None and not self._stop.is_set():
                on_ready()
            while not self._stop.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), 0.5)
                for child in list(self.children):
                    # One that is being removed may have gone from the list meanwhile.
                    if child in self.children and not child.alive and not self._stop.is_set():
                        await self._restart(child, restart_limit)
        finally:
            for child in reversed(self.children):
                if child.process.component in ("Frontend", "Router"):
                    await child.stop(10.0)
            left = [*self._leaving, *reversed(self.children)]
            await asyncio.gather(*(child.stop(self._grace_s) for child in left))
            self._directory.cleanup()

    async def _start_all(self) -> None:
        """Workers load their models side by side; the router waits for them by itself."""
        began = time.monotonic()
        for child in self.children:
            await child.start(self._environment | {"DYN_SYSTEM_PORT": str(system_port())})
            self._say(child, "starting")
        waiting = list(self.children)
        while waiting and not self._stop.is_set():
            for child in list(waiting):
                if not child.alive:
                    code = child.handle.returncode if child.handle else None
                    raise ConfigError(f"{child.label} ended with code {code} before it was ready; its reason is above")
                if await self._is_ready(child):
                    self._say(child, f"ready after {time.monotonic() - began:.0f} s")
                    waiting.remove(child)
            if time.monotonic() - began > READY_S:
                raise MigrateError(f"not ready within {READY_S:g} s: {', '.join(c.label for c in waiting)}")
            await asyncio.sleep(0.1)

    async def _is_ready(self, child: Child) -> bool:
        if child.process.component != "Frontend":
            return child.ready_file.exists()
        try:
            async with httpx.AsyncClient(timeout=2.0) as client:
                reply = await client.get(f"http://{dialled(self._plan.host)}:{self._plan.port}/v1/models")
                return bool(reply.json().get("data"))
        except (httpx.HTTPError, ValueError):
            return False

    async def _restart(self, child: Child, limit: int) -> None:
        if time.monotonic() - child.started > _STEADY_S:
            child.restarts = 0
        child.restarts += 1
        if child.restarts > limit and child.optional:
            self.children.remove(child)
            self._say(child, f"has ended {child.restarts} times; going on without it")
            return
        if child.restarts > limit:
            raise MigrateError(f"{child.label} has ended {child.restarts} times; giving up")
        delay = min(30.0, 0.5 * 2**child.restarts)
        code = child.handle.returncode if child.handle else None
        self._say(child, f"ended with code {code}; restart {child.restarts} of {limit} in {delay:g} s")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), delay)
        if not self._stop.is_set():
            await child.start(self._environment | {"DYN_SYSTEM_PORT": str(system_port())})

    def _say(self, child: Child, what: str) -> None:
        self._console.print(f"[bold]{child.label:>16}[/] {what}")
