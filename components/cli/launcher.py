# SPDX-License-Identifier: Apache-2.0
"""Runs a graph: servers, processes, web page, and the file by which commands find it.

Life cycle: ``run`` returns after SIGINT, SIGTERM or SIGHUP, or when ``then`` returns True; it raises ``ConfigError``
when something cannot start and ``MigrateError`` when something cannot be kept running. Nothing is left behind, also
after SIGKILL (``components.serve.warden``). Threading: one asyncio loop, in the main thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable

from rich.console import Console
from rich.markup import escape

from components.address import Address, bare, dialled, in_url
from components.dashboard.access import VARIABLE, token_for, url_of
from components.errors import ConfigError
from components.metrics.export import reachable
from components.serve.places import Places
from components.serve.plan import Plan, Process
from components.serve.scale import connected
from components.serve.servers import Servers, answers, listens
from components.serve.state import State, forget, remember
from components.serve.supervisor import Supervisor
from components.serve.surroundings import quiet, surroundings
from components.serve.warden import Warden

_PAGES = 20
"""Ports after the frontend's that are tried for the web page."""
Then = Callable[[], Awaitable[bool]]
"""Called when the graph serves; True ends it."""


class Launcher:
    """See the module docstring. ``page``: port of the web page; 0: none; ``None``: the next free one."""

    def __init__(self, plan: Plan, console: Console, page: int | None = None) -> None:
        self._plan = plan
        self._console = console
        self._wanted_page = page
        self._serves_http = bool(plan.ports)
        self._jobs: list[asyncio.Task[None]] = []

    async def run(self, then: Then | None = None) -> None:
        """Serve."""
        plan = self._plan
        for port in plan.ports:
            if answers(dialled(plan.host), port, 0.5):
                raise ConfigError(f"port {port} is in use: stop what listens there, or choose another with --port")
        with contextlib.ExitStack() as stack:
            warden = stack.enter_context(contextlib.closing(Warden()))
            places = stack.enter_context(contextlib.closing(Places(os.environ, warden)))
            for line in (*plan.said, *places.said):
                self._console.print(f"[yellow]{escape(line)}[/]")
            servers = Servers(warden)
            stack.callback(servers.stop)
            self._servers = servers.start(os.environ)
            environment = surroundings(os.environ, places.variables, self._servers)
            self._supervisor = Supervisor(plan, environment, self._console, warden=warden)
            self._state = State.of_this_process(plan.namespace, self._servers["ETCD_ENDPOINTS"], plan.port)
            warden.keep_clean(self._state.path)
            await self._until_stopped(servers, then)

    async def _until_stopped(self, servers: Servers, then: Then | None) -> None:
        supervisor = self._supervisor
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, supervisor.stop)
        keeping = asyncio.ensure_future(self._keep(servers))
        keeping.add_done_callback(lambda _: supervisor.stop())
        self._jobs.append(keeping)
        try:
            if self._plan.bounds:
                # Dynamo's runtime in this process reads the address of etcd from here.
                os.environ["ETCD_ENDPOINTS"] = self._servers["ETCD_ENDPOINTS"]
                # It would warn of the missing etcd at the end.
                quiet(os.environ)
                self._jobs.append(asyncio.ensure_future((await connected(self._plan, supervisor)).run()))
            await supervisor.run(lambda: self._ready(then))
        finally:
            given_up = keeping.exception() if keeping.done() else None
            for job in self._jobs:
                job.cancel()
            await asyncio.gather(*self._jobs, return_exceptions=True)
            forget(self._state)
        if given_up is not None:
            raise given_up

    def _ready(self, then: Then | None) -> None:
        remember(self._state)
        if self._serves_http:
            where = ", ".join(f"http://{in_url(self._plan.host)}:{port}/v1" for port in self._plan.ports)
            self._console.print(f"[bold green]serving[/] {escape(self._plan.model)} on {where} (Ctrl-C stops)")
        self._jobs.append(asyncio.ensure_future(self._after(then)))

    async def _keep(self, servers: Servers) -> None:
        while True:
            await asyncio.sleep(0.5)
            for program in servers.revive():
                self._console.print(f"[bold red]{program} has ended[/]; started again with its data")

    async def _page(self) -> None:
        """Start the web page, which the graph does not need. All components have taken their random ports by now."""
        plan, first = self._plan, self._plan.ports[-1] + 1
        wanted = range(first, min(first + _PAGES, 65536)) if self._wanted_page is None else [self._wanted_page]
        port = next((port for port in wanted if listens(plan.host, port)), 0)
        if not port:
            cause = f"port {self._wanted_page} is in use" if self._wanted_page else f"no free port from {first} on"
            self._console.print(f"[yellow]no web page[/]: {cause}; choose one with --dashboard, or use: dynamo top")
            return
        where = ("--host", bare(plan.host), "--port", str(port))
        frontend = str(Address(reachable(plan.host), plan.port))
        token = token_for(plan.host)
        environment = {"DYN_NAMESPACE": plan.namespace, "DYN_SYSTEM_PORT": "-1", VARIABLE: token}
        if "DYN_LOG" not in os.environ:
            environment["DYN_LOG"] = "error"
        command = ["python", "-m", "components.dashboard", *where, "--frontend", frontend]
        page = Process(component="Page", replica=0, command=command, environment=environment)
        if await self._supervisor.serves(await self._supervisor.add(page)):
            shown = url_of(plan.host, port, token)
            self._console.print(f"[bold green]watch it[/] on {shown} or with: dynamo top", soft_wrap=True)
        else:
            self._console.print("[yellow]no web page[/]; its reason is above; watch it with: dynamo top")

    async def _after(self, then: Then | None) -> None:
        """The page comes last: its line must not fall into the output of ``then``."""
        if then is not None and await then():
            self._supervisor.stop()
        elif self._serves_http and self._wanted_page != 0:
            await self._page()
