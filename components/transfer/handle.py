# SPDX-License-Identifier: Apache-2.0
"""One transfer under way: wait for it in a thread, await it in asyncio, or have a function called.

Life cycle: made by the agent, settled exactly once: by the agent's worker thread, or by the thread that waits.
Thread-safe throughout. Callbacks run on the worker thread and must not block it; what they raise is logged and dropped.
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
        self.help_out: Callable[[float], None] | None = None
        """Set by the worker: a thread that waits may do the last steps itself, where nobody is to be called back."""
        self.cancelled = False
        self.progress = 0
        """Bytes that have arrived so far."""
        self.total = 0
        """Bytes to move; 0 until the peer is known."""
        self.poisoned_blocks: tuple[int, ...] = ()
        """After a failure: destination blocks into which a peer that hangs may still write.
        Empty almost always; ``TransferAgent.poisoned_blocks`` says when they are safe again."""

    def done(self) -> bool:
        """True once there is a result or an error."""
        return self._done.is_set()

    def cancel(self) -> None:
        """Ask it to end; it settles as soon as nothing more can land in its blocks."""
        self.cancelled = True

    def wait(self, timeout_s: float | None = None) -> TransferResult:
        """The result. Raises the transfer's error, or ``TimeoutError`` when it is still under way."""
        help_out = self.help_out
        if help_out is not None and not self._callbacks and not self.done():
            help_out(timeout_s if timeout_s is not None else threading.TIMEOUT_MAX)
        if not self._done.wait(timeout_s):
            raise TimeoutError(f"the transfer is still under way after {timeout_s} s")
        if self._error is not None:
            raise self._error
        if self._result is None:
            raise TransferError("the transfer ended without a result")
        return self._result

    def add_done_callback(self, callback: Callable[[TransferHandle], None]) -> None:
        """Call it once the transfer has ended; at once when it already has."""
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
            # The waiting loop may have been closed meanwhile; then nobody waits any more.
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle)

        self.add_done_callback(wake)
        yield from ended
        return self.wait(0)

    def settle(self, result: TransferResult | None, error: MigrateError | None) -> None:
        """End it. Called by the agent alone."""
        with self._lock:
            if self._done.is_set():
                return
            self._result, self._error = result, error
            self._done.set()
            self.help_out = None
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            try:
                callback(self)
            except Exception:
                logger.exception("a transfer's callback failed")
