# SPDX-License-Identifier: Apache-2.0
"""State of publishing a record: set by a store, awaited by the agent's start.

Thread-safe. A permanent error (refused password, wrong certificate) ends the wait at once. After the first success
no error does: peers that know each other go on without a store.
"""

from __future__ import annotations

import threading

from components.errors import ConfigError, TransferUnavailable


class Publication:
    """See the module docstring."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.done = False
        self.trouble: Exception | None = None
        """Error of the last attempt."""

    def succeeded(self) -> None:
        """Mark the record as stored."""
        with self._changed:
            self.done, self.trouble = True, None
            self._changed.notify_all()

    def failed(self, error: Exception) -> None:
        """Note a failed attempt."""
        with self._changed:
            self.trouble = error
            self._changed.notify_all()

    @property
    def hopeless(self) -> bool:
        """True when the last error is permanent."""
        return isinstance(self.trouble, TransferUnavailable | ConfigError)

    def wait(self, timeout_s: float) -> bool:
        """Wait. True once published; False after the time-out or a permanent error."""
        with self._changed:
            self._changed.wait_for(lambda: self.done or self.hopeless, timeout_s)
            return self.done
