# SPDX-License-Identifier: Apache-2.0
"""Listening sockets of this package, with a handshake first and bounded cost before it.

``Acceptor`` serves each connection on a thread. It does the handshake (``components.handshake``) before ``serve`` gets
the connection, so that no socket can lack it.
Bounds: ``Limits.unproven`` connections at a time before their proof, each for at most ``Limits.proof_s``; when
strangers hold all of these places, the oldest is closed for a new one. Each costs a descriptor, a small buffer and a
thread. After the proof: ``Limits.served`` connections; further ones are closed.
Life cycle: accepts from construction to ``close``, which also ends open connections.
Errors: ``serve`` owns its time-outs; its ``OSError``, ``MigrateError`` and errors of undecodable bytes end the
connection and are logged, any other error is logged as a fault of this package.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from components.errors import MigrateError
from components.handshake import accepting, greet
from components.wire import UNREADABLE

logger = logging.getLogger(__name__)
_BACKLOG = 128
_KEEP_ALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))
"""TCP keep-alive that detects a vanished host within a minute."""
_ENDS = (OSError, MigrateError, *UNREADABLE)


@dataclass(frozen=True)
class Limits:
    """Bounds of an acceptor."""

    unproven: int = 64
    proof_s: float = 10.0
    yield_s: float = 0.5
    """Time for which a connection keeps its place when all are taken; more than a peer on a busy machine needs."""
    served: int = 512


def prepare(connection: socket.socket) -> None:
    """Set the options of a connection."""
    if connection.family == socket.AF_UNIX:
        return
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEP_ALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


class Acceptor:
    """See the module docstring. ``server`` is a bound socket."""

    def __init__(
        self,
        server: socket.socket,
        purpose: str,
        serve: Callable[[socket.socket], None],
        name: str,
        limits: Limits | None = None,
    ) -> None:
        self._server = server
        self._purpose = purpose
        self._serve = serve
        self._name = name
        self._limits = limits or Limits()
        self._unproven: dict[socket.socket, float] = {}
        self._proven: set[socket.socket] = set()
        self._free = threading.Condition()
        self._closed = False
        server.listen(_BACKLOG)
        threading.Thread(target=self._accept, name=name, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError as error:
                if self._closed:
                    return
                # No free descriptor, or a client that left at once: go on accepting.
                logger.warning("%s: a connection was not accepted: %s", self._name, error)
                time.sleep(0.1)
                continue
            if not self._admit(connection):
                connection.close()
                return
            threading.Thread(target=self._run, args=(connection,), name=f"{self._name}-in", daemon=True).start()

    def _admit(self, connection: socket.socket) -> bool:
        """Wait for a place. False after ``close``."""
        with self._free:
            while not self._closed and len(self._unproven) >= self._limits.unproven:
                oldest, since = next(iter(self._unproven.items()))
                waits = since + self._limits.yield_s - time.monotonic()
                if waits <= 0:
                    _shut(oldest)  # Its thread ends and removes it.
                self._free.wait(max(waits, 0.01))
            if not self._closed:
                self._unproven[connection] = time.monotonic()
            return not self._closed

    def _run(self, connection: socket.socket) -> None:
        try:
            prepare(connection)
            greet(connection, accepting(self._purpose), time.monotonic() + self._limits.proof_s)
            if self._promote(connection):
                self._serve(connection)
        except _ENDS as error:
            logger.info("%s: a connection was ended: %s", self._name, error)
        except Exception:
            logger.exception("%s: a connection", self._name)
        finally:
            with self._free:
                self._unproven.pop(connection, None)
                self._proven.discard(connection)
                self._free.notify()
            connection.close()

    def _promote(self, connection: socket.socket) -> bool:
        with self._free:
            self._unproven.pop(connection, None)
            self._free.notify()
            if len(self._proven) >= self._limits.served:
                logger.warning("%s: %d peers are connected, no more are taken", self._name, len(self._proven))
                return False
            self._proven.add(connection)
            return not self._closed

    def close(self) -> None:
        """Accept no more, end open connections. Idempotent."""
        with self._free:
            self._closed = True
            still = [*self._unproven, *self._proven]
            self._free.notify()
        for sock in (self._server, *still):
            _shut(sock)
        self._server.close()


def _shut(sock: socket.socket) -> None:
    # close() alone would not wake a waiting thread.
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError as error:
        logger.debug("closing a socket: %s", error)
