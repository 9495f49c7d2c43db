# SPDX-License-Identifier: Apache-2.0
"""How publishing a record goes: told by a store, waited for by the agent's start.

Thread-safe. An error that another try will not mend (a refused password, a wrong certificate) ends the wait at once;
after the first success none of them does any more: peers that know each other go on while a store is away.
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
        """What the last try failed with."""

    def succeeded(self) -> None:
        """The record is in the store."""
        with self._changed:
            self.done, self.trouble = True, None
            self._changed.notify_all()

    def failed(self, error: Exception) -> None:
        """A try has failed."""
        with self._changed:
            self.trouble = error
            self._changed.notify_all()

    @property
    def hopeless(self) -> bool:
        """True when the last try's error is final."""
        return isinstance(self.trouble, TransferUnavailable | ConfigError)

    def wait(self, timeout_s: float) -> bool:
        """True once published; False after the time, or as soon as it is hopeless."""
        with self._changed:
            self._changed.wait_for(lambda: self.done or self.hopeless, timeout_s)
            return self.done
