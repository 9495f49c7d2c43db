# SPDX-License-Identifier: Apache-2.0
"""A process that multiprocessing has started ends when the one that started it does, even by SIGKILL.

vLLM's engine core asks nobody whether its worker still lives: alone it would keep its memory for ever, and the worker's
successor would find none. One daemon thread, which needs the interpreter for its last act only.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from functools import cache
from multiprocessing.connection import wait


@cache
def end_with_parent() -> None:
    """From now on. Does nothing in a process that was not started by multiprocessing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_watch, args=(parent.sentinel,), name="parent", daemon=True).start()


def _watch(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
