# SPDX-License-Identifier: Apache-2.0
"""Connections between workers: the calls of moves, and the tokens of requests that one worker reads at another.

Dynamo's request plane carries each item by itself, and each makes both processes wait for Python's lock behind the
tokens of all their streams: in a drain of 256 requests a call took 0.13 s. Over a link all that has come is read at
once, and what one turn of the loop makes leaves together.

    caller                                        owner
    a LINK call over Dynamo ---------------------> answers its address and epoch
    <------- handshake (components.handshake) ---->
    Said (number, call) -------------------------->
    <------------------ Told ((number, reply), ..)
    Said (number, ATTACH) ------------------------>
    <------------------ Told ((number, reply), ..)
    <---------------- Told ((number, Attached), ..) until ``Attached.end``, or a DETACH of that number

A link lives from the first call to the end of one of the processes. Its end ends its calls and readers with
``WorkerLost``.

Threading: one asyncio loop; the owner's acceptor has a thread for each connection, which only waits. No time-outs but
``_OPEN_S``: callers have them. Errors: those of the peer; ``WorkerLost``; ``Unauthorized``.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from concurrent.futures import CancelledError
from contextlib import aclosing
from typing import Annotated, Any, TypeVar

import msgspec

from components.acceptor import Acceptor, prepare
from components.address import Address, bare, listen
from components.engine.protocol import GenerateOutput
from components.errors import InvalidRequest, MigrateError, WorkerLost, from_code
from components.frames import framed
from components.handshake import connect
from components.migration.messages import Attached, LinkTo, WorkerCall, WorkerOp, WorkerReply
from components.wire import UNREADABLE

logger = logging.getLogger(__name__)
_OPEN_S = 5.0
_MAX_BYTES = 64 << 20
_LENGTH = 4

T = TypeVar("T", bound=msgspec.Struct)


class Said(msgspec.Struct, frozen=True):
    """One call. The caller gives each one a number."""

    number: int
    call: WorkerCall


class Told(msgspec.Struct, frozen=True, omit_defaults=True):
    """Answers to calls, and items for readers, by the numbers of their calls."""

    replies: Annotated[tuple[tuple[int, WorkerReply], ...], msgspec.Meta(max_length=65536)] = ()
    items: Annotated[tuple[tuple[int, Attached], ...], msgspec.Meta(max_length=65536)] = ()


def _purpose(epoch: str) -> str:
    return f"worker-link {epoch}"


async def _hear(reader: asyncio.StreamReader, kind: type[T]) -> T:
    """The next message. Raises ``InvalidRequest`` for a malformed or too large one, and as streams do."""
    length = int.from_bytes(await reader.readexactly(_LENGTH), "big")
    if length > _MAX_BYTES:
        raise InvalidRequest(f"a message of {length} bytes; at most {_MAX_BYTES}")
    try:
        return msgspec.msgpack.decode(await reader.readexactly(length), type=kind)
    except UNREADABLE as error:
        raise InvalidRequest(f"not a {kind.__name__} message: {error}") from error


def _say(writer: asyncio.StreamWriter, message: msgspec.Struct) -> None:
    data = msgspec.msgpack.encode(message)
    if len(data) > _MAX_BYTES:
        raise InvalidRequest(f"a message of {len(data)} bytes; at most {_MAX_BYTES}")
    writer.write(framed(data))


async def _streams(sock: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    sock.setblocking(False)
    return await asyncio.open_connection(sock=sock)


class _Link:
    """The caller's side of one connection."""

    def __init__(self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._name = name
        self._writer = writer
        self._numbers = itertools.count(1)
        self._replies: dict[int, asyncio.Future[WorkerReply]] = {}
        self._inboxes: dict[int, asyncio.Queue[Attached | MigrateError]] = {}
        self.failure: MigrateError | None = None
        self._task = asyncio.ensure_future(self._run(reader))

    async def _run(self, reader: asyncio.StreamReader) -> None:
        failure: MigrateError = WorkerLost(f"{self._name} closed its link")
        try:
            while True:
                told = await _hear(reader, Told)
                for number, reply in told.replies:
                    if (waiting := self._replies.get(number)) is not None and not waiting.done():
                        waiting.set_result(reply)
                for number, item in told.items:
                    if (inbox := self._inboxes.get(number)) is not None:
                        inbox.put_nowait(item)
        except (OSError, EOFError) as error:
            failure = WorkerLost(f"{self._name}: its link has ended: {error}")
        except MigrateError as error:
            failure = error
        finally:
            self.failure = failure
            for waiting in self._replies.values():
                if not waiting.done():
                    waiting.set_exception(failure)
            for inbox in self._inboxes.values():
                inbox.put_nowait(failure)
            self._writer.close()

    async def ask(self, call: WorkerCall, number: int | None = None) -> WorkerReply:
        """A call and its answer."""
        if self.failure is not None:
            raise self.failure
        number = number or next(self._numbers)
        reply: asyncio.Future[WorkerReply] = asyncio.get_running_loop().create_future()
        self._replies[number] = reply
        try:
            _say(self._writer, Said(number, call))
            return await reply
        finally:
            del self._replies[number]

    async def attach(self, call: WorkerCall) -> AsyncGenerator[Attached, None]:
        """The items of an ``ATTACH`` call; the first one is empty."""
        number = next(self._numbers)
        inbox: asyncio.Queue[Attached | MigrateError] = asyncio.Queue()
        self._inboxes[number] = inbox
        ended = False
        try:
            reply = await self.ask(call, number)
            if reply.error is not None:
                ended = True
                raise from_code(*reply.error)
            yield Attached()
            while True:
                items = [await inbox.get()]
                while not inbox.empty():
                    items.append(inbox.get_nowait())
                # A reader that is slower than the link gets several outputs at once.
                outputs: tuple[GenerateOutput, ...] = ()
                for item in items:
                    if isinstance(item, Attached) and item.moved is None and item.error is None and not item.end:
                        outputs += item.outputs
                        continue
                    if outputs:
                        yield Attached(outputs)
                        outputs = ()
                    if isinstance(item, MigrateError):
                        raise item
                    if item.end:
                        ended = True
                        return
                    yield item
                if outputs:
                    yield Attached(outputs)
        finally:
            del self._inboxes[number]
            if not ended and self.failure is None:
                _say(self._writer, Said(number, WorkerCall(WorkerOp.DETACH)))

    def close(self) -> None:
        """Its calls and readers end with ``WorkerLost``."""
        self._task.cancel()


class Links:
    """The caller's side. ``ask`` makes a call over Dynamo's request plane."""

    def __init__(self, ask: Callable[[int, WorkerCall], Awaitable[WorkerReply]]) -> None:
        self._ask = ask
        self._links: dict[int, asyncio.Task[_Link]] = {}

    async def ask(self, instance: int, call: WorkerCall) -> WorkerReply:
        """A call and its answer."""
        return await (await self._to(instance)).ask(call)

    async def attach(self, instance: int, call: WorkerCall) -> AsyncGenerator[Attached, None]:
        """The items of an ``ATTACH`` call; the first one is empty."""
        async with aclosing((await self._to(instance)).attach(call)) as items:
            async for item in items:
                yield item

    async def _to(self, instance: int) -> _Link:
        opening = self._links.get(instance)
        if opening is None or (opening.done() and _failed(opening)):
            opening = self._links[instance] = asyncio.ensure_future(self._open(instance))
            opening.add_done_callback(_failed)
        return await asyncio.shield(opening)

    async def _open(self, instance: int) -> _Link:
        name = f"worker {instance:016x}"
        try:
            async with asyncio.timeout(_OPEN_S):
                reply = await self._ask(instance, WorkerCall(WorkerOp.LINK))
            if reply.error is not None:
                raise from_code(*reply.error)
            if reply.link is None:
                raise WorkerLost(f"{name} takes no links")
            end = asyncio.get_running_loop().time() + _OPEN_S
            sock = await asyncio.to_thread(connect, reply.link.address, _purpose(reply.link.epoch), end)
            prepare(sock)
            return _Link(name, *await _streams(sock))
        except (OSError, ValueError) as error:
            raise WorkerLost(f"{name} cannot be reached: {error}") from error

    def close(self) -> None:
        """End all links."""
        for opening in self._links.values():
            if opening.done() and not _failed(opening):
                opening.result().close()
            opening.cancel()


def _failed(opening: asyncio.Task[_Link]) -> bool:
    return opening.cancelled() or opening.exception() is not None or opening.result().failure is not None


class Owner:
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
        self.where = LinkTo(str(Address(bare(host), server.getsockname()[1])), epoch)
        self._acceptor = Acceptor(server, _purpose(epoch), self._serve, "worker-link")

    def _serve(self, connection: socket.socket) -> None:
        work: Coroutine[Any, Any, None] = self._run(connection)
        try:
            asyncio.run_coroutine_threadsafe(work, self._loop).result()
        except (RuntimeError, CancelledError) as error:
            # The loop has ended.
            work.close()
            logger.debug("worker-link: %s", error)

    async def _run(self, connection: socket.socket) -> None:
        reader, writer = await _streams(connection)
        caller = _Caller(writer, self._answer, self._attach)
        try:
            while True:
                caller.take(await _hear(reader, Said))
        except EOFError:
            pass
        finally:
            caller.close()
            writer.close()

    def close(self) -> None:
        """End all links. Idempotent."""
        self._acceptor.close()


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
            _say(self._writer, told)
        except InvalidRequest as error:
            logger.error("worker-link: %s", error)
            self._writer.close()

    def close(self) -> None:
        """Nobody hears the answers."""
        for task in self._tasks.values():
            task.cancel()
