# SPDX-License-Identifier: Apache-2.0
"""Accepts connections of a listening socket and serves each on a thread of its own.

Life cycle: accepts from construction to ``close``, which also ends the connections that are open.
Threading: ``serve`` runs on the connection's thread and owns its time-outs; what it raises of ``OSError``,
``MigrateError`` and undecodable bytes ends the connection and is logged, anything else is logged as a fault of ours.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable

from components.errors import MigrateError
from components.wire import UNREADABLE

logger = logging.getLogger(__name__)


class Acceptor:
    """See the module docstring."""

    def __init__(self, server: socket.socket, serve: Callable[[socket.socket], None], name: str) -> None:
        self._server = server
        self._serve = serve
        self._name = name
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._closed = False
        threading.Thread(target=self._accept, name=name, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            with self._lock:
                if self._closed:
                    connection.close()
                    return
                self._open.add(connection)
            threading.Thread(target=self._run, args=(connection,), name=f"{self._name}-in", daemon=True).start()

    def _run(self, connection: socket.socket) -> None:
        try:
            self._serve(connection)
        except (OSError, MigrateError, *UNREADABLE) as error:
            logger.info("%s: a connection was ended: %s", self._name, error)
        except Exception:
            logger.exception("%s: a connection", self._name)
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()

    def close(self) -> None:
        """Accept no more, end what is open. Idempotent."""
        with self._lock:
            self._closed = True
            still = list(self._open)
        for sock in (self._server, *still):
            # Closing alone wakes no thread that waits for it.
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError as error:
                logger.debug("closing a socket: %s", error)
        self._server.close()
