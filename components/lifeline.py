# SPDX-License-Identifier: Apache-2.0
"""Ends a process of multiprocessing with its parent, also after SIGKILL.

vLLM's engine core does not check that its worker lives: without this it would keep its memory for ever, and the
worker's successor would find none. One daemon thread, which needs the GIL only at the end.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from functools import cache
from multiprocessing.connection import wait


@cache
def end_with_parent() -> None:
    """Begin to watch the parent. Does nothing in a process without multiprocessing's parent."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_watch, args=(parent.sentinel,), name="parent", daemon=True).start()


def _watch(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
