# SPDX-License-Identifier: Apache-2.0
"""A lane's blocking work on another thread, as steps for the agent's worker."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor

from components.errors import MigrateError
from components.transfer.data.base import Copy


def on_thread(
    pool: ThreadPoolExecutor, copy: Copy, work: Callable[[Copy, threading.Event], int]
) -> Generator[bool, None, int]:
    """Run ``work`` and return its bytes. The event stops it. Blocks are unsafe while it outlives the transfer."""
    stop = threading.Event()
    future = pool.submit(work, copy, stop)
    try:
        while not future.done():
            yield False
    except MigrateError:
        stop.set()
        while not future.done():
            yield False
        raise
    finally:
        if not future.done():
            settled = copy.mark_unsafe()
            future.add_done_callback(lambda _: settled())
    return future.result()
