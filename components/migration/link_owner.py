# SPDX-License-Identifier: Apache-2.0
"""The side of a link that answers: calls of other workers, and the tokens that they read here; see ``links``.

Threading: one asyncio loop; the acceptor has a thread for each connection, which only waits.
Errors: those of a call go to its caller; a malformed message ends its link.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from concurrent.futures import CancelledError
from contextlib import aclosing
from typing import Any

from components.acceptor import Acceptor
from components.address import Address, bare, listen
from components.engine.kv import SocketRef
from components.errors import InvalidRequest, MigrateError
from components.frames import heard
from components.migration.link_wire import MAX_BYTES, Said, Told, purpose, say, streams
from components.migration.messages import Attached, WorkerCall, WorkerOp, WorkerReply

logger = logging.getLogger(__name__)


class LinkOwner:
    """The owner's side. ``answer`` gives the reply to a call, ``attach`` the items of an ``ATTACH``, the first of which
    is empty.
    """

    def __init__(
        self,
        host: str,
        answer: Callable[[WorkerCall], Awaitable[WorkerReply]],
        attach: Callable[[WorkerCall], AsyncGenerator[Attached, None]],
    ) -> None:
        self._answer = answer
        self._attach = attach
        self._loop = asyncio.get_running_loop()
        epoch = secrets.token_hex(16)
        server = listen(host)
        self.where = SocketRef(str(Address(bare(host), server.getsockname()[1])), epoch)
        self.acceptor = Acceptor(server, purpose(epoch), self._serve, "worker-link")

    def _serve(self, connection: socket.socket) -> None:
        work: Coroutine[Any, Any, None] = self._run(connection)
        try:
            asyncio.run_coroutine_threadsafe(work, self._loop).result()
        except (RuntimeError, CancelledError) as error:
            # The loop has ended.
            work.close()
            logger.debug("worker-link: %s", error)

    async def _run(self, connection: socket.socket) -> None:
        reader, writer = await streams(connection)
        caller = _Caller(writer, self._answer, self._attach)
        try:
            while True:
                caller.take(await heard(reader, Said, MAX_BYTES))
        except EOFError:
            pass
        finally:
            caller.close()
            writer.close()


class _Caller:
    """One connection at the owner."""

    def __init__(
        self,
        writer: asyncio.StreamWriter,
        answer: Callable[[WorkerCall], Awaitable[WorkerReply]],
        attach: Callable[[WorkerCall], AsyncGenerator[Attached, None]],
    ) -> None:
        self._writer = writer
        self._answer = answer
        self._attach = attach
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._replies: list[tuple[int, WorkerReply]] = []
        self._items: list[tuple[int, Attached]] = []

    def take(self, said: Said) -> None:
        """Begin to answer. Raises ``InvalidRequest`` for a number in use."""
        if said.call.op is WorkerOp.DETACH:
            if (task := self._tasks.get(said.number)) is not None:
                task.cancel()
            return
        if said.number in self._tasks:
            raise InvalidRequest(f"call {said.number} is being answered")
        work = self._pass if said.call.op is WorkerOp.ATTACH else self._reply
        self._tasks[said.number] = asyncio.ensure_future(work(said.number, said.call))

    async def _reply(self, number: int, call: WorkerCall) -> None:
        try:
            reply = await self._answer(call)
        except Exception as error:
            logger.exception("the call %s failed", call.op)
            reply = WorkerReply(error=(MigrateError.code, str(error)))
        finally:
            del self._tasks[number]
        self._tell(reply=(number, reply))

    async def _pass(self, number: int, call: WorkerCall) -> None:
        begun = False
        try:
            async with aclosing(self._attach(call)) as stream:
                async for item in stream:
                    if begun:
                        self._tell(item=(number, item))
                    else:
                        begun = True
                        self._tell(reply=(number, WorkerReply()))
        except MigrateError as error:
            if not begun:
                self._tell(reply=(number, WorkerReply(error=(error.code, str(error)))))
                return
            self._tell(item=(number, Attached(error=(error.code, str(error)))))
        finally:
            del self._tasks[number]
        self._tell(item=(number, Attached(end=True)))

    def _tell(self, reply: tuple[int, WorkerReply] | None = None, item: tuple[int, Attached] | None = None) -> None:
        if not self._replies and not self._items:
            asyncio.get_running_loop().call_soon(self._flush)
        if reply is not None:
            self._replies.append(reply)
        if item is not None:
            self._items.append(item)

    def _flush(self) -> None:
        told = Told(tuple(self._replies), tuple(self._items))
        self._replies, self._items = [], []
        if self._writer.is_closing():
            return
        try:
            say(self._writer, told)
        except InvalidRequest as error:
            logger.error("worker-link: %s", error)
            self._writer.close()

    def close(self) -> None:
        """Cancel all answers: the caller is gone."""
        for task in self._tasks.values():
            task.cancel()
