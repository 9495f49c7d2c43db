# SPDX-License-Identifier: Apache-2.0
"""Ends processes with the launcher, and everything that one of them has started.

Each process of a graph leads its own session. Everything that it starts stays in that session, also after its death: a
vLLM worker leaves its engine core, which holds the memory that a successor needs. ``end`` kills a session and returns
when nothing of it is left. It kills Python's resource trackers last: they remove shared memory of killed processes, and
end by themselves. Linux only; no state.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterable

import psutil

from components.errors import ConfigError

_TRACKER_S = 5.0
_GONE_S = 10.0
_POLL_S = 0.02


def tied(command: list[str]) -> list[str]:
    """A command as a child that the kernel kills with this process, or with the thread of it that has started it.

    It does not begin when this process has ended before the kernel knew. ``bash`` and not ``sh``, which drops
    variables whose names are no names of its own.
    """
    if shutil.which("setpriv") is None:
        raise ConfigError("setpriv is not installed: apt-get install util-linux")
    begin = f'[ "$PPID" = {os.getpid()} ] && exec "$@"'
    return ["setpriv", "--pdeathsig", "KILL", "bash", "-p", "-c", begin, "bash", *command]


def alive(session: int) -> list[psutil.Process]:
    """Running processes of a session."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


async def end(sessions: Iterable[int]) -> None:
    """Kill all processes of the sessions. Processes that have left them are not found."""
    sessions = list(sessions)

    def left() -> list[psutil.Process]:
        return [member for session in sessions for member in alive(session)]

    def workers() -> list[psutil.Process]:
        return [member for member in left() if not _is_tracker(member)]

    await _kill(workers)
    until = time.monotonic() + _TRACKER_S
    while left() and time.monotonic() < until:
        await asyncio.sleep(_POLL_S)
    await _kill(left)


async def _kill(find: Callable[[], list[psutil.Process]]) -> None:
    """Repeated: a process may start another one while it is killed."""
    until = time.monotonic() + _GONE_S
    while (found := find()) and time.monotonic() < until:
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        await asyncio.sleep(_POLL_S)


def _is_tracker(process: psutil.Process) -> bool:
    try:
        return any("multiprocessing.resource_tracker" in part for part in process.cmdline())
    except psutil.Error:
        return False
