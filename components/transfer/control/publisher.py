# SPDX-License-Identifier: Apache-2.0
"""The thread that keeps an agent's record published.

Life cycle: ``start`` returns once the record is in the store; otherwise it stops and raises ``TransferError``,
``TransferUnavailable`` or ``ConfigError``. ``stop`` withdraws the record. This module sets the time-out.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable

from components.errors import MigrateError, TransferError
from components.transfer.config import AgentConfig
from components.transfer.control.directory import Directory
from components.transfer.control.endpoint import without_secrets
from components.transfer.control.factory import store_of
from components.transfer.control.publication import Publication
from components.transfer.control.record import AgentRecord

logger = logging.getLogger(__name__)

PUBLISH_S = 15.0
"""Wait for a server's first answer."""


class Publisher:
    """See the module docstring."""

    def __init__(self, config: AgentConfig) -> None:
        self._config = config
        self._thread: threading.Thread | None = None
        self._cancel: Callable[[], object] = lambda: None

    def start(self, record: AgentRecord, directory: Directory) -> None:
        """Publish the record and begin to watch others."""
        config = self._config
        store = store_of(config)
        publication = Publication()

        async def keep() -> None:
            loop = asyncio.get_running_loop()
            task = asyncio.ensure_future(store.run(record, directory, publication))
            self._cancel = lambda: loop.call_soon_threadsafe(task.cancel)
            try:
                await task
            except asyncio.CancelledError:
                logger.debug("agent %s is withdrawn", config.name)
            finally:
                self._cancel = lambda: None

        self._thread = threading.Thread(target=lambda: asyncio.run(keep()), name="kv-records", daemon=True)
        self._thread.start()
        try:
            publication.result(PUBLISH_S)
        except TimeoutError:
            self.stop()
            where = ", ".join(map(without_secrets, config.etcd_endpoints or (config.nats_url,)))
            raise TransferError(
                f"the record of agent {config.name} could not be published at {where} within {PUBLISH_S:g} s: "
                f"{publication.trouble or 'no answer'}; is the server running, and is the address right?"
            ) from None
        except MigrateError:
            self.stop()
            raise

    def stop(self) -> None:
        """Withdraw. Idempotent."""
        cancel, self._cancel = self._cancel, lambda: None
        cancel()
        if self._thread is not None:
            self._thread.join(5.0)
