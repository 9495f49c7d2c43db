# SPDX-License-Identifier: Apache-2.0
"""One transfer in flight: wait for it in a thread, await it in asyncio, or add a callback.

Life cycle: made by the agent, settled exactly once, by the agent's worker thread or by a waiting thread.
Thread-safe. Callbacks run on the worker thread and must not block it; their exceptions are logged and dropped.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Generator
from typing import Any

from components.errors import MigrateError, TransferError
from components.transfer.config import TransferResult

logger = logging.getLogger(__name__)


class TransferHandle:
    """See the module docstring."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._result: TransferResult | None = None
        self._error: MigrateError | None = None
        self._callbacks: list[Callable[[TransferHandle], None]] = []
        self._lock = threading.Lock()
        self.step_inline: Callable[[float], None] | None = None
        """Set by the worker: steps the transfer on a waiting thread, where there is no callback."""
        self.cancelled = False
        self.unsafe_blocks: tuple[int, ...] = ()
        """After a failure: destination blocks that a hanging peer may still write to.
        Empty almost always; ``TransferAgent.unsafe_blocks`` says when they are safe again."""

    def done(self) -> bool:
        """True once there is a result or an error."""
        return self._done.is_set()

    def cancel(self) -> None:
        """Request the end; the handle settles as soon as nothing can write to its blocks any more."""
        self.cancelled = True

    def wait(self, timeout_s: float | None = None) -> TransferResult:
        """The result. Raises the transfer's error, or ``TimeoutError`` after ``timeout_s``."""
        step_inline = self.step_inline
        if step_inline is not None and not self._callbacks and not self.done():
            step_inline(timeout_s if timeout_s is not None else threading.TIMEOUT_MAX)
        if not self._done.wait(timeout_s):
            raise TimeoutError(f"the transfer is still under way after {timeout_s} s")
        if self._error is not None:
            raise self._error
        if self._result is None:
            raise TransferError("the transfer ended without a result")
        return self._result

    def add_done_callback(self, callback: Callable[[TransferHandle], None]) -> None:
        """Call it when the transfer ends, or at once when it has ended."""
        with self._lock:
            if not self.done():
                self._callbacks.append(callback)
                return
        callback(self)

    def __await__(self) -> Generator[Any, None, TransferResult]:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def settle() -> None:
            if not ended.done():
                ended.set_result(None)

        def wake(_: TransferHandle) -> None:
            # A closed loop has no waiter left.
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle)

        self.add_done_callback(wake)
        yield from ended
        return self.wait(0)

    def settle(self, result: TransferResult | None, error: MigrateError | None) -> None:
        """Set result or error. For the agent alone."""
        with self._lock:
            if self._done.is_set():
                return
            self._result, self._error = result, error
            self._done.set()
            self.step_inline = None
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            try:
                callback(self)
            except Exception:
                logger.exception("a transfer's callback failed")
