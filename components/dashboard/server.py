# SPDX-License-Identifier: Apache-2.0
"""The web page, as a process of its own: ``python -m components.dashboard --port 8001``.

    /            the page
    /api/state   the newest sample and the history, once
    /api/stream  the same at once, then every new sample, as server-sent events; at least one in ten seconds
    /targets     where Prometheus finds all metrics (its HTTP service discovery)

It only reads; it cannot move or drain. It loads nothing from other hosts (its content policy forbids that).
Beyond loopback everything needs the page's token (``access.py``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from components.dashboard.access import guard
from components.dashboard.sample import Sampler

STATIC = Path(__file__).parent / "static"
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Page:
    """The handlers. ``frontend`` is Dynamo's HTTP address, for its metrics. Without a token the page is open to all."""

    def __init__(self, sampler: Sampler, frontend: str = "", token: str = "") -> None:
        self._sampler = sampler
        self._frontend = frontend
        self._token = token

    def application(self) -> web.Application:
        """For ``aiohttp``."""
        application = web.Application(middlewares=[guard(self._token)])
        application.add_routes(
            [
                web.get("/", self.index),
                web.get("/api/state", self.state),
                web.get("/api/stream", self.stream),
                web.get("/targets", self.targets),
                web.static("/static", STATIC),
            ]
        )
        application.on_response_prepare.append(_secure)
        return application

    async def index(self, _: web.Request) -> web.FileResponse:
        """The page."""
        return web.FileResponse(STATIC / "index.html")

    async def state(self, _: web.Request) -> web.Response:
        """Everything at once."""
        return web.Response(body=self._told(history=True), content_type="application/json")

    def _told(self, history: bool) -> bytes:
        sampler = self._sampler
        told = {"error": sampler.error, "latest": sampler.latest}
        return msgspec.json.encode(told | {"history": list(sampler.history)} if history else told)

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """Everything, then every sample until the browser disconnects."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        await response.prepare(request)
        told = self._told(history=True)
        while True:
            try:
                await response.write(b"data: " + told + b"\n\n")
            except ConnectionError:
                return response
            await self._sampler.next()
            told = self._told(history=False)

    async def targets(self, _: web.Request) -> web.Response:
        """Prometheus' HTTP service discovery."""
        groups: list[dict[str, Any]] = []
        if self._frontend:
            groups.append({"targets": [self._frontend], "labels": {"component": "frontend"}})
        latest = self._sampler.latest
        if latest is not None:
            for worker in latest.workers:
                if worker.metrics:
                    groups.append({"targets": [worker.metrics], "labels": {"component": worker.role}})
        return web.json_response(groups)


async def _secure(_: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(_HEADERS)


async def serve(page: Page, host: str, port: int) -> web.AppRunner:
    """Listen. Raises ``OSError`` when the port is taken. Close the result with ``cleanup``."""
    # No access log: the first request of a browser has the token in its URL.
    runner = web.AppRunner(page.application(), shutdown_timeout=1.0, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    return runner
