# SPDX-License-Identifier: Apache-2.0
"""Cleans up after a killed launcher: ``python -m components.serve.warden`` reads its pipe.

The launcher writes each session that it starts and each path to remove. The pipe ends with the launcher, whatever
ends it; then the warden kills the sessions and removes the paths. After an orderly end nothing is left to do. The
process ignores signals to the launcher's whole group. ``Warden`` is the launcher's side; no threads. When warden and
launcher are both killed, processes still end (``tied``), but files can stay.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from components.serve import family


class Warden:
    """The launcher's side of the pipe. ``close`` ends the warden, which first removes all that it still knows."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "components.serve.warden"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def cover(self, session: int) -> None:
        """Register a session that must end with the launcher."""
        self._write(f"+session {session}")

    def release(self, session: int) -> None:
        """Unregister an ended session, whose number may be reused."""
        self._write(f"-session {session}")

    def keep_clean(self, path: Path) -> None:
        """Register a file or folder to remove."""
        self._write(f"+path {path}")

    def _write(self, line: str) -> None:
        pipe = self._process.stdin
        with contextlib.suppress(OSError, ValueError):
            if pipe is not None:
                pipe.write(line.encode(errors="surrogateescape") + b"\n")
                pipe.flush()

    def close(self) -> None:
        """End the warden. Idempotent."""
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(30)


def follow(lines: Iterable[bytes]) -> tuple[set[int], set[Path]]:
    """Sessions and paths that are registered at the end of the pipe. Drops a truncated line."""
    sessions: set[int] = set()
    paths: set[Path] = set()
    for line in lines:
        word, _, value = line.decode(errors="surrogateescape").removesuffix("\n").partition(" ")
        if not line.endswith(b"\n"):
            break
        if word == "+path":
            paths.add(Path(value))
        elif word == "+session":
            sessions.add(int(value))
        elif word == "-session":
            sessions.discard(int(value))
    return sessions, paths


async def clear(sessions: set[int], paths: set[Path]) -> None:
    """Kill processes first: they write in the folders."""
    await family.end(sessions)
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            path.unlink()


def main() -> None:
    """Wait for the launcher's end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    asyncio.run(clear(*follow(sys.stdin.buffer)))


if __name__ == "__main__":
    main()
