# SPDX-License-Identifier: Apache-2.0
"""A lane's blocking work on a thread of its own, as steps for the agent's worker."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor

from components.errors import MigrateError
from components.transfer.data.base import Copy


def on_thread(
    pool: ThreadPoolExecutor, copy: Copy, work: Callable[[Copy, threading.Event], int]
) -> Generator[bool, None, int]:
    """Run ``work`` and give its bytes. The event tells it to stop; blocks are poisoned if it is left while it runs."""
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
            settled = copy.poison()
            future.add_done_callback(lambda _: settled())
    return future.result()
