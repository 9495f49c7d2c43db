# SPDX-License-Identifier: Apache-2.0
"""What each process does for a move, and when: on with ``DYN_MIGRATE_TIMELINE=FOLDER``, nothing otherwise.

Each process writes a file of its own, a line for each mark: seconds on ``time.monotonic``, which processes of one host
share; who marks; what; the request. ``python -m benchmarks.migration.timeline`` reads them. Any thread.
"""

from __future__ import annotations

import os
import time
from functools import cache
from pathlib import Path
from typing import IO

from components import env

_folder = env.TIMELINE.read()


def mark(who: str, what: str, request_id: str) -> None:
    """Something has just happened to a request. ``who``: source or target, with ``-core`` inside of its engine."""
    if _folder:
        _file(os.getpid()).write(f"{time.monotonic():.6f} {who} {what} {request_id.partition('~')[0]}\n")


@cache
def _file(pid: int) -> IO[str]:
    folder = Path(_folder)
    folder.mkdir(parents=True, exist_ok=True)
    return (folder / f"{pid}.marks").open("a", buffering=1)
