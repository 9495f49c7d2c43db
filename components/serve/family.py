# SPDX-License-Identifier: Apache-2.0
"""Processes that end with the launcher, and the end of all that one of them has started.

Each process of a graph leads a session of its own. Whatever it starts stays in that session, also after it has been
killed: a vLLM worker leaves its engine core, which holds the memory that a successor needs. ``end`` kills a session and
returns when nothing of it is left. Python's resource trackers are killed last: they remove shared memory of those that
were killed, and end by themselves. Linux only; no state.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

_TRACKER_S = 5.0
_GONE_S = 10.0
_POLL_S = 0.02
_TIED = str(Path(__file__).with_name("tied.py"))


def tied(command: list[str]) -> list[str]:
    """The command for a child of this process that the kernel kills when this process ends."""
    return [sys.executable, "-I", "-S", _TIED, str(os.getpid()), *command]


def alive(session: int) -> list[psutil.Process]:
    """Processes of a session that run."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


async def end(sessions: Iterable[int]) -> None:
    """Kill all processes of the sessions. A process that its leader has put elsewhere is not found."""
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
    """Again and again: one that is being killed may have started another."""
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
