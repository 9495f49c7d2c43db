# SPDX-License-Identifier: Apache-2.0
"""Starts the web page beside a graph, as a separate process that the graph does not need.

``beside`` yields its URL, with a token beyond loopback (empty: no page), and ends it with the block. It raises
nothing: a page that does not start writes a line to the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator, Mapping

from components.address import bare, dialled, listen
from components.dashboard.access import VARIABLE, token_for, url_of
from components.serve import family
from components.serve.servers import answers
from components.serve.surroundings import quiet

_START_S = 30.0
_STOP_S = 5.0
_TRIES = 20


def page_port(wanted: int | None, host: str, frontend_port: int) -> int:
    """The wanted port, or the first free one after the frontend's. 0: no page.

    Call it after all components have started, which take random ports.
    """
    if wanted is not None:
        return wanted
    ports = range(frontend_port + 1, min(frontend_port + 1 + _TRIES, 65536))
    return next((port for port in ports if _free(host, port)), 0)


def _free(host: str, port: int) -> bool:
    try:
        listen(host, port).close()
    except OSError:
        return False
    return True


@contextlib.asynccontextmanager
async def beside(port: int, host: str, frontend: str, variables: Mapping[str, str]) -> AsyncIterator[str]:
    """Run the page on ``port`` during the block, which begins when the page answers or has failed."""
    if not port:
        yield ""
        return
    token = token_for(host)
    command = [sys.executable, "-m", "components.dashboard", "--host", bare(host), "--port", str(port)]
    environment = dict(os.environ) | dict(variables) | {VARIABLE: token}
    quiet(environment)
    environment.pop("DYN_SYSTEM_PORT", None)
    child = await asyncio.create_subprocess_exec(
        *family.tied([*command, "--frontend", frontend]),
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield url_of(host, port, token) if await _up(child, dialled(host), port) else ""
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.terminate()
        try:
            await asyncio.wait_for(child.wait(), _STOP_S)
        except TimeoutError:
            child.kill()
            await child.wait()


async def _up(child: asyncio.subprocess.Process, host: str, port: int) -> bool:
    end = time.monotonic() + _START_S
    while child.returncode is None and time.monotonic() < end:
        if await asyncio.to_thread(answers, host, port, 0.2):
            return child.returncode is None
        await asyncio.sleep(0.1)
    return False
