# SPDX-License-Identifier: Apache-2.0
"""Starts the web page beside a graph, as a process that the graph can do without.

``beside`` yields its port (0: there is no page) and ends it with the block. It raises nothing: a page that does not
start is a line in the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator, Mapping

from components.address import dialled
from components.serve.servers import answers

_START_S = 30.0
_STOP_S = 5.0
_TRIES = 20


def page_port(wanted: int | None, frontend_port: int) -> int:
    """The wanted port, or the first free one after the frontend's. 0: no page."""
    if wanted is not None:
        return wanted
    ports = range(frontend_port + 1, frontend_port + 1 + _TRIES)
    return next((port for port in ports if not answers("127.0.0.1", port, 0.2)), 0)


@contextlib.asynccontextmanager
async def beside(port: int, host: str, frontend: str, variables: Mapping[str, str]) -> AsyncIterator[None]:
    """Run the page on ``port`` for the time of the block, which begins when it answers, or never will."""
    if not port:
        yield
        return
    command = [sys.executable, "-m", "components.dashboard", "--host", host, "--port", str(port)]
    environment = dict(os.environ) | dict(variables)
    environment.setdefault("DYN_LOG", "error")
    environment.pop("DYN_SYSTEM_PORT", None)
    child = await asyncio.create_subprocess_exec(
        *command, "--frontend", frontend, env=environment, stdin=asyncio.subprocess.DEVNULL, start_new_session=True
    )
    try:
        end = time.monotonic() + _START_S
        while child.returncode is None and time.monotonic() < end:
            if await asyncio.to_thread(answers, dialled(host), port, 0.2):
                break
            await asyncio.sleep(0.1)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.terminate()
        try:
            await asyncio.wait_for(child.wait(), _STOP_S)
        except TimeoutError:
            child.kill()
            await child.wait()
