# SPDX-License-Identifier: Apache-2.0
"""Commits that go from the source's engine straight to the destination's, two processes sooner than by the workers.

    destination                                             source
    the landing's status, with ``CommitTo`` ------------->
                                                            freeze: connects, while the last step still runs
    <----------------------------- handshake ------------>
    <--------------------- Call(COMMIT) ------------------  once the state is made
    taken in between two steps                              the worker's own commit follows, and finds this one done

It only saves time. It gets no answer: when it is lost, late or refused, the worker's own commit does the work or gets
the error. No token of a landing leaves its engine before the worker's commit has come (``VLLMEngine.generate``), so a
source that resumes the request meanwhile has given nobody anything.

Threading: ``Outbox`` belongs to the engine core's thread and never makes it wait: a thread for each peer connects, and
sends what the socket does not take at once. ``Inbox`` has a thread for each connection; ``take`` is the core's.
Bounds: ``_MAX_BYTES`` of one commit, ``_KEPT`` commits between two steps, ``_PEERS`` connections of an outbox; those of
an inbox are ``components.acceptor``'s. Errors: none are raised, they are logged as debug.
"""

from __future__ import annotations

import logging
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from components.acceptor import Acceptor
from components.address import Address, bare, listen
from components.engine.kv import CommitTo, Frozen, RequestId
from components.engine.vllm.control import Call, Op, encode
from components.errors import InvalidRequest, MigrateError
from components.frames import framed, hear, is_open
from components.handshake import connect
from components.timeline import mark

logger = logging.getLogger(__name__)
_MAX_BYTES = 16 << 20
"""Largest commit: the tokens and blocks of the longest contexts that models have."""
_KEPT = 256
_PEERS = 64
_CONNECT_S = 5.0
_SEND_S = 5.0


def purpose(epoch: str) -> str:
    """Of the handshake."""
    return f"kv-commit {epoch}"


class Inbox:
    """The destination's side: a socket of this engine core."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._epoch = secrets.token_hex(16)
        self._address = ""
        self._calls: deque[Call] = deque(maxlen=_KEPT)
        self._wake: Callable[[], None] = lambda: None
        self._acceptor: Acceptor | None = None

    def listen(self, wake: Callable[[], None]) -> None:
        """Accept commits; ``wake`` is called for each, on any thread. Idempotent."""
        if self._acceptor is not None:
            return
        try:
            server = listen(self._host)
        except OSError as error:
            logger.info("commits come by way of the workers alone: %s: %s", self._host, error)
            return
        self._wake = wake
        self._address = str(Address(bare(self._host), server.getsockname()[1]))
        self._acceptor = Acceptor(server, purpose(self._epoch), self._serve, "kv-commit")

    def at(self, vllm_id: str) -> CommitTo | None:
        """Where a source sends the commit of that life; None while commits are not accepted."""
        return CommitTo(self._address, self._epoch, RequestId(vllm_id)) if self._acceptor is not None else None

    def _serve(self, connection: socket.socket) -> None:
        while True:
            try:
                call = hear(connection, Call, _MAX_BYTES, None)
            except ConnectionError as error:
                logger.debug("kv-commit: %s", error)
                return
            if call.op is not Op.COMMIT or call.frozen is None:
                raise InvalidRequest(f"{call.op} is no commit")
            mark("target-core", "commit came", call.request_id)
            self._calls.append(call)
            self._wake()

    def take(self) -> Iterator[Call]:
        """Commits since the last call."""
        while self._calls:
            yield self._calls.popleft()

    def close(self) -> None:
        """Take no more. Idempotent."""
        if self._acceptor is not None:
            self._acceptor.close()


class Outbox:
    """The source's side: connections to the engine cores of destinations."""

    def __init__(self) -> None:
        self._lines: dict[tuple[str, str], _Line] = {}

    def open(self, to: CommitTo) -> None:
        """Begin to connect, because a commit may follow; an open connection is kept."""
        key = (to.address, to.epoch)
        line = self._lines.pop(key, None)
        try:
            self._lines[key] = line if line is not None and line.usable() else _Line(*key)
        except RuntimeError as error:
            logger.debug("commits to %s go by way of the workers: %s", to.address, error)
        while len(self._lines) > _PEERS:
            self._lines.pop(next(iter(self._lines))).close()

    def send(self, to: CommitTo, frozen: Frozen) -> None:
        """Send the state at once, or as soon as the connection is there."""
        data = encode(Call(Op.COMMIT, to.request_id, frozen=frozen))
        line = self._lines.get((to.address, to.epoch))
        if line is not None and len(data) <= _MAX_BYTES:
            line.send(framed(data))

    def close(self) -> None:
        """End all connections. Idempotent."""
        while self._lines:
            self._lines.popitem()[1].close()


class _Line:
    """A connection to one engine core. Its socket blocks only while its thread sends."""

    def __init__(self, address: str, epoch: str) -> None:
        self._address = address
        self._epoch = epoch
        self._changed = threading.Condition()
        self._sock: socket.socket | None = None
        self._rest: deque[bytes] = deque()
        """What the thread is sending, or has still to send."""
        self._over = False
        threading.Thread(target=self._run, name="kv-commit-out", daemon=True).start()

    def usable(self) -> bool:
        """Whether it is open, or about to be."""
        with self._changed:
            return not self._over and (self._sock is None or bool(self._rest) or is_open(self._sock))

    def send(self, data: bytes) -> None:
        """Send what the socket takes at once; the thread sends the rest."""
        with self._changed:
            if self._sock is not None and not self._rest and not self._over:
                try:
                    data = data[self._sock.send(data) :]
                except BlockingIOError:
                    pass
                except OSError as error:
                    self._end(error)
            if data and not self._over:
                self._rest.append(data)
                self._changed.notify()

    def close(self) -> None:
        """Send no more."""
        with self._changed:
            self._over = True
            self._changed.notify()

    def _run(self) -> None:
        try:
            with connect(self._address, purpose(self._epoch), time.monotonic() + _CONNECT_S) as sock:
                sock.setblocking(False)
                with self._changed:
                    self._sock = sock
                while (data := self._next()) is not None:
                    sock.settimeout(_SEND_S)
                    sock.sendall(data)
                    sock.setblocking(False)
                    with self._changed:
                        self._rest.popleft()
        except (OSError, ValueError, MigrateError) as error:
            self._end(error)
        finally:
            self.close()

    def _next(self) -> bytes | None:
        with self._changed:
            self._changed.wait_for(lambda: self._rest or self._over)
            return self._rest[0] if not self._over else None

    def _end(self, error: Exception) -> None:
        logger.debug("commits to %s go by way of the workers: %s", self._address, error)
        self.close()
