# SPDX-License-Identifier: Apache-2.0
"""Whether a record is published: set by a store, awaited by the agent's start.

Thread-safe. A permanent error (refused password, wrong certificate) ends the wait at once. After the first success
no error does: peers that know each other go on without a store.
"""

from __future__ import annotations

from concurrent.futures import Future

from components.errors import ConfigError, TransferUnavailable


class Publication(Future[None]):
    """See the module docstring."""

    trouble: Exception | None = None
    """Error of the last attempt."""

    def succeeded(self) -> None:
        """Mark the record as stored."""
        if not self.done():
            self.set_result(None)

    def failed(self, error: Exception) -> None:
        """Note a failed attempt."""
        self.trouble = error
        if isinstance(error, TransferUnavailable | ConfigError) and not self.done():
            self.set_exception(error)
