# SPDX-License-Identifier: Apache-2.0
"""What goes between the same two workers at the same moment goes in one message.

Each call and each item on Dynamo's request plane makes both processes wait for Python's lock several times, behind
the tokens of all their streams; a drain makes thousands. So calls of one turn of the loop go as one ``MANY`` call,
whose answers come in groups, and all requests that a worker reads at another one come through one pipe:

    reader                                  owner
    PIPE (number) ------------------------>
    <------------------------------- Piped  the pipe is open
    ATTACH (pipe, reader, life) ---------->
    <---------------------------- the reply
    <------- Piped ((reader, Attached), ..)  until ``Attached.end``, or DETACH, or the end of the pipe

A pipe exists while it has readers. Its end is the end of each of them. ``Calls`` and ``Pipes`` are the caller's and
the reader's side, ``Outlets`` the owner's.

Threading: one asyncio loop. No time-outs: callers have them. Errors: ``MigrateError`` of the peer; ``WorkerLost`` when
a message or its answer is lost.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

import msgspec

from components.errors import InvalidRequest, MigrateError, RequestNotFound, SessionError, WorkerLost, from_code
from components.messages import unpack
from components.migration.messages import Attached, Piped, Replies, WorkerCall, WorkerOp, WorkerReply

logger = logging.getLogger(__name__)
_BUNDLE_BYTES = 8 << 20
"""A bundle of calls ends with the one that reaches this size."""

Stream = Callable[[int, WorkerCall], AsyncGenerator[Any, None]]
"""Sends one call to a worker over Dynamo; its items."""


class Calls:
    """Single calls to other workers."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._waiting: dict[int, list[tuple[WorkerCall, asyncio.Future[WorkerReply]]]] = {}
        """Calls of this turn of the loop, by worker; the first one is under way already."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def ask(self, instance: int, call: WorkerCall) -> WorkerReply:
        """A call and its answer."""
        waiting = self._waiting.get(instance)
        if waiting is None:
            self._waiting[instance] = []
            asyncio.get_running_loop().call_soon(self._flush, instance)
            return await self._alone(instance, call)
        reply: asyncio.Future[WorkerReply] = asyncio.get_running_loop().create_future()
        waiting.append((call, reply))
        return await reply

    async def _alone(self, instance: int, call: WorkerCall) -> WorkerReply:
        reply: WorkerReply | None = None
        # To the end of the stream: both sides would log an early end as a cancelled call.
        async with aclosing(self._stream(instance, call)) as stream:
            async for item in stream:
                reply = unpack(item, WorkerReply)
        if reply is None:
            raise _unanswered(instance)
        return reply

    def _flush(self, instance: int) -> None:
        calls: list[msgspec.Raw] = []
        replies: list[asyncio.Future[WorkerReply]] = []
        size = 0
        for call, reply in self._waiting.pop(instance):
            data = msgspec.msgpack.encode(call)
            calls.append(msgspec.Raw(data))
            replies.append(reply)
            size += len(data)
            if size >= _BUNDLE_BYTES:
                self._send(instance, calls, replies)
                calls, replies, size = [], [], 0
        if calls:
            self._send(instance, calls, replies)

    def _send(self, instance: int, calls: list[msgspec.Raw], replies: list[asyncio.Future[WorkerReply]]) -> None:
        task = asyncio.ensure_future(self._together(instance, calls, replies))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _together(
        self, instance: int, calls: list[msgspec.Raw], replies: list[asyncio.Future[WorkerReply]]
    ) -> None:
        failure: Exception = _unanswered(instance)
        try:
            async with aclosing(self._stream(instance, WorkerCall(WorkerOp.MANY, calls=tuple(calls)))) as stream:
                async for item in stream:
                    some = unpack(item, Replies)
                    if some.error is not None:
                        raise from_code(*some.error)
                    for number, reply in some.replies:
                        if number < len(replies) and not replies[number].done():
                            replies[number].set_result(reply)
        except MigrateError as error:
            failure = error
        finally:
            for waiting in replies:
                if not waiting.done():
                    waiting.set_exception(failure)


def _unanswered(instance: int) -> WorkerLost:
    return WorkerLost(f"worker {instance:016x} closed a call without an answer")


async def answered(call: WorkerCall, answer: Callable[[WorkerCall], Any]) -> AsyncGenerator[Replies, None]:
    """The callee's side of ``MANY``: ``answer`` gives the reply to one call.

    Raises ``InvalidRequest`` for calls that cannot be read, before any of them is answered.
    """
    try:
        calls = [msgspec.msgpack.decode(raw, type=WorkerCall) for raw in call.calls]
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"not a WorkerCall message: {error}") from error
    if any(inner.op in (WorkerOp.MANY, WorkerOp.PIPE) for inner in calls):
        raise InvalidRequest("a bundle of calls contains another stream")
    done: asyncio.Queue[tuple[int, WorkerReply]] = asyncio.Queue()

    async def one(number: int, inner: WorkerCall) -> None:
        try:
            reply = await answer(inner)
        except Exception as error:
            logger.exception("the call %s failed", inner.op)
            reply = WorkerReply(error=(MigrateError.code, str(error)))
        done.put_nowait((number, reply))

    tasks = [asyncio.ensure_future(one(number, inner)) for number, inner in enumerate(calls)]
    left = len(tasks)
    try:
        while left:
            replies = [await done.get()]
            while not done.empty():
                replies.append(done.get_nowait())
            left -= len(replies)
            yield Replies(tuple(replies))
    finally:
        for task in tasks:
            task.cancel()


class _Pipe:
    """The reader's side of one pipe."""

    def __init__(self, instance: int, stream: Stream) -> None:
        self.number = secrets.randbits(63)
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.inboxes: dict[int, asyncio.Queue[Attached | MigrateError]] = {}
        self.failure: MigrateError | None = None
        self._numbers = itertools.count(1)
        self._task = asyncio.ensure_future(
            self._run(stream(instance, WorkerCall(WorkerOp.PIPE, pipe=self.number)), instance)
        )

    async def _run(self, stream: AsyncGenerator[Any, None], instance: int) -> None:
        failure: MigrateError = WorkerLost(f"worker {instance:016x} closed a pipe")
        try:
            async with aclosing(stream):
                async for item in stream:
                    piped = unpack(item, Piped)
                    if piped.error is not None:
                        raise from_code(*piped.error)
                    if not self.opened.done():
                        self.opened.set_result(None)
                    for reader, attached in piped.items:
                        if (inbox := self.inboxes.get(reader)) is not None:
                            inbox.put_nowait(attached)
        except MigrateError as error:
            failure = error
        finally:
            self.failure = failure
            if not self.opened.done():
                self.opened.set_result(None)
            for inbox in self.inboxes.values():
                inbox.put_nowait(failure)

    def subscribe(self) -> tuple[int, asyncio.Queue[Attached | MigrateError]]:
        """A number for one more reader, and its items."""
        number = next(self._numbers)
        self.inboxes[number] = asyncio.Queue()
        return number, self.inboxes[number]

    def close(self) -> None:
        """Nobody reads any more."""
        self._task.cancel()


class Pipes:
    """The reader's side: one pipe to each worker at which something is read."""

    def __init__(self, stream: Stream, call: Callable[[int, WorkerCall], Any]) -> None:
        self._stream = stream
        self._call = call
        self._pipes: dict[int, _Pipe] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def attach(self, instance: int, call: WorkerCall) -> AsyncGenerator[Attached, None]:
        """The items of an ``ATTACH`` call without pipe and reader; the first one is empty."""
        async with self._reader(instance) as (pipe, number, inbox):
            await asyncio.shield(pipe.opened)
            if pipe.failure is not None:
                raise pipe.failure
            await self._call(instance, msgspec.structs.replace(call, pipe=pipe.number, reader=number))
            yield Attached()
            while True:
                item = await inbox.get()
                if isinstance(item, MigrateError):
                    raise item
                if item.end:
                    del pipe.inboxes[number]
                    return
                yield item

    @asynccontextmanager
    async def _reader(self, instance: int) -> AsyncIterator[tuple[_Pipe, int, asyncio.Queue[Attached | MigrateError]]]:
        pipe = self._pipes.get(instance)
        if pipe is None or pipe.failure is not None:
            pipe = self._pipes[instance] = _Pipe(instance, self._stream)
        number, inbox = pipe.subscribe()
        try:
            yield pipe, number, inbox
        finally:
            ended = pipe.inboxes.pop(number, None) is None
            if not pipe.inboxes:
                if self._pipes.get(instance) is pipe:
                    del self._pipes[instance]
                pipe.close()
            elif not ended and pipe.failure is None:
                self._spawn(self._detach(instance, WorkerCall(WorkerOp.DETACH, pipe=pipe.number, reader=number)))

    async def _detach(self, instance: int, call: WorkerCall) -> None:
        # The end of the pipe ends its readers too.
        with suppress(MigrateError):
            await self._call(instance, call)

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Outlet:
    """The owner's side of one pipe."""

    def __init__(self) -> None:
        self._items: list[tuple[int, Attached]] = []
        self._changed = asyncio.Event()
        self._readers: dict[int, asyncio.Task[None]] = {}

    async def items(self) -> AsyncGenerator[Piped, None]:
        """An empty one, then all that comes, without end."""
        yield Piped()
        while True:
            await self._changed.wait()
            self._changed.clear()
            items, self._items = self._items, []
            yield Piped(tuple(items))

    async def attach(self, reader: int, stream: AsyncGenerator[Attached, None]) -> None:
        """Begin to read. Raises what its first item raises."""
        if reader in self._readers:
            raise SessionError(f"reader {reader} has begun already")
        await anext(stream)
        self._readers[reader] = asyncio.ensure_future(self._pass(reader, stream))

    async def _pass(self, reader: int, stream: AsyncGenerator[Attached, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    self._put(reader, item)
        except MigrateError as error:
            self._put(reader, Attached(error=(error.code, str(error))))
        finally:
            self._readers.pop(reader, None)
            self._put(reader, Attached(end=True))

    def _put(self, reader: int, item: Attached) -> None:
        self._items.append((reader, item))
        self._changed.set()

    def detach(self, reader: int) -> None:
        """Read no more."""
        if (task := self._readers.get(reader)) is not None:
            task.cancel()

    def close(self) -> None:
        """The pipe is gone."""
        for task in self._readers.values():
            task.cancel()


class Outlets:
    """The owner's side of all pipes."""

    def __init__(self) -> None:
        self._outlets: dict[int, _Outlet] = {}

    async def items(self, call: WorkerCall) -> AsyncGenerator[Piped, None]:
        """The stream of a ``PIPE`` call. Raises ``SessionError`` for a number in use."""
        if call.pipe in self._outlets:
            raise SessionError(f"pipe {call.pipe:x} exists")
        outlet = self._outlets[call.pipe] = _Outlet()
        try:
            async with aclosing(outlet.items()) as items:
                async for item in items:
                    yield item
        finally:
            del self._outlets[call.pipe]
            outlet.close()

    async def attach(self, call: WorkerCall, stream: AsyncGenerator[Attached, None]) -> None:
        """Answer an ``ATTACH`` call. Raises ``RequestNotFound`` without its pipe, and what the stream raises."""
        outlet = self._outlets.get(call.pipe)
        if outlet is None:
            raise RequestNotFound(f"pipe {call.pipe:x} is not open")
        await outlet.attach(call.reader, stream)

    def detach(self, call: WorkerCall) -> None:
        """Answer a ``DETACH`` call."""
        if (outlet := self._outlets.get(call.pipe)) is not None:
            outlet.detach(call.reader)
