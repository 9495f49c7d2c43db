# SPDX-License-Identifier: Apache-2.0
"""Connections between workers: the calls of moves, and the tokens of requests that one worker reads at another.

This is the caller's side; ``link_owner`` is the other one.

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

Threading: one asyncio loop. No time-outs but ``_OPEN_S``: callers have them.
Errors: those of the peer; ``WorkerLost``; ``Unauthorized``.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

from components.acceptor import prepare
from components.engine.protocol import GenerateOutput
from components.errors import MigrateError, WorkerLost, from_code
from components.frames import heard
from components.handshake import connect
from components.migration.link_wire import MAX_BYTES, Said, Told, purpose, say, streams
from components.migration.messages import Attached, WorkerCall, WorkerOp, WorkerReply

_OPEN_S = 5.0


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
                told = await heard(reader, Told, MAX_BYTES)
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
            say(self._writer, Said(number, call))
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
                say(self._writer, Said(number, WorkerCall(WorkerOp.DETACH)))


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
            sock = await asyncio.to_thread(connect, reply.link.address, purpose(reply.link.epoch), end)
            prepare(sock)
            return _Link(name, *await streams(sock))
        except (OSError, ValueError) as error:
            raise WorkerLost(f"{name} cannot be reached: {error}") from error


def _failed(opening: asyncio.Task[_Link]) -> bool:
    return opening.cancelled() or opening.exception() is not None or opening.result().failure is not None
