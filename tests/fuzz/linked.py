# SPDX-License-Identifier: Apache-2.0
"""Both ends of a link between workers: whatever the other end says, nothing is left waiting."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

from components.engine.protocol import GenerateOutput
from components.errors import MigrateError
from components.frames import framed, heard
from components.migration import link_owner, links
from components.migration.link_wire import MAX_BYTES, Said
from components.migration.messages import Attached, WorkerCall, WorkerOp, WorkerReply
from tests.fuzz.inputs import Target
from tests.fuzz.samples import R


class _Sink:
    """A writer whose other end reads everything."""

    def __init__(self) -> None:
        self.closed = False

    def write(self, data: bytes) -> None:
        """Taken."""

    def is_closing(self) -> bool:
        """After ``close``."""
        return self.closed

    def close(self) -> None:
        """No more."""
        self.closed = True


def link(data: bytes) -> None:
    """A message to the worker that takes links, and the same as an answer to one that made one."""
    asyncio.run(_both(data))


async def _both(data: bytes) -> None:
    refused = await _owner(_said(data))
    await _caller(_said(data))
    if refused is not None:
        raise refused


def _said(data: bytes) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    reader.feed_data(framed(data))
    reader.feed_eof()
    return reader


async def _owner(reader: asyncio.StreamReader) -> MigrateError | None:
    sink: Any = _Sink()

    async def answer(call: WorkerCall) -> WorkerReply:
        return WorkerReply(left=1)

    async def attach(call: WorkerCall) -> AsyncGenerator[Attached, None]:
        yield Attached()
        yield Attached((GenerateOutput(0, (1,)),))

    caller = link_owner._Caller(sink, answer, attach)
    refused = None
    try:
        while True:
            caller.take(await heard(reader, Said, MAX_BYTES))
    except EOFError:
        pass
    except MigrateError as error:
        refused = error
    for _ in range(10):
        await asyncio.sleep(0)
    if caller._tasks or caller._replies or caller._items:
        raise AssertionError("something is left to answer")
    return refused


async def _caller(reader: asyncio.StreamReader) -> None:
    sink: Any = _Sink()
    made = links._Link("it", reader, sink)

    async def read() -> None:
        async for _ in made.attach(WorkerCall(WorkerOp.ATTACH, R)):
            pass

    waiting = [asyncio.ensure_future(read()), asyncio.ensure_future(made.ask(WorkerCall(WorkerOp.LANDING, R)))]
    done, left = await asyncio.wait(waiting, timeout=5.0)
    for task in done:
        with suppress(MigrateError):
            task.result()
    if left or not sink.closed or made._replies or made._inboxes:
        raise AssertionError("something still waits for a link that has ended")


TARGETS = [Target("link", link)]
