# SPDX-License-Identifier: Apache-2.0
"""One process of a graph: started, its output printed, stopped with everything that it has started.

Every process leads its own session (``components.serve.family``). Threading: one asyncio loop, in the main thread.
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
from collections.abc import Mapping
from pathlib import Path

import psutil
from rich.console import Console
from rich.text import Text

from components import env
from components.serve import family
from components.serve.arguments import filled
from components.serve.plan import Process
from components.serve.servers import free_port
from components.serve.surroundings import is_noise
from components.serve.warden import Warden

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
        """Failures in a row; reset after a while of uptime."""
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
