# SPDX-License-Identifier: Apache-2.0
"""Outputs of many requests over one connection between worker and router, on real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from components.engine.protocol import FinishReason, GenerateOutput
from components.errors import InvalidRequest, MigrateError, SessionError, WorkerLost
from components.frames import Frames, frame, unframe
from components.messages import Batch, Hello, WorkerOp
from components.router.outputs import OutputChannel
from components.router.workers import Worker
from components.worker.service import WorkerService
from tests.faults.network import Context
from tests.paged import collect, engines, request
from tests.unit.told import ToldStream

BATCH = Batch(((1, GenerateOutput(0, (5,))), (2, GenerateOutput(3, (6, 7), finish_reason=FinishReason.LENGTH))))


class Endpoint:
    """Dynamo's way to a handler; ``items`` counts what came in streams."""

    def __init__(self, handler: Any, stream: bool) -> None:
        self._handler = handler
        self._stream = stream
        self.items = 0

    async def direct(self, payload: Any, instance: int, **_: Any) -> AsyncIterator[Any]:
        return self._answers(self._handler(payload, Context()) if self._stream else self._handler(payload))

    async def _answers(self, stream: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for item in stream:
            self.items += 1
            yield item


@asynccontextmanager
async def served() -> AsyncIterator[tuple[Worker, Endpoint, WorkerService]]:
    """A router's view of a worker with an engine, before it has connected."""
    async with engines(1, step_s=0.001) as (engine,):
        service = WorkerService(engine, engine._live.info)
        await service.listen("127.0.0.1")
        generate = Endpoint(service.generate, stream=True)
        worker = Worker(1, "decode", generate, Endpoint(service.control, stream=False))
        worker.state = await worker.call(WorkerOp.INFO)
        try:
            yield worker, generate, service
        finally:
            service.stop()


async def answer(worker: Worker, name: str, count: int = 20) -> tuple[list[int], FinishReason | None]:
    """What a client of the router gets. Raises what its reader is told."""
    stream = ToldStream(request(name, count=count), 5.0)
    stream.owner = stream.open(worker)
    reason = None
    while reason is None:
        item = await asyncio.wait_for(stream.outputs.get(), 10)
        if isinstance(item, MigrateError):
            raise item
        reason = item.finish_reason
    await stream.owner.ended.wait()
    await stream.close()
    return stream.tokens, reason


async def test_all_requests_are_answered_over_the_one_connection() -> None:
    async with served() as (worker, streams, _), engines(1) as (alone,):
        await worker.connect()
        found = await asyncio.gather(*(answer(worker, f"r{n}") for n in range(6)))
        assert streams.items == 0
        for n, (tokens, reason) in enumerate(found):
            assert (tokens, reason) == await collect(alone.generate(request(f"r{n}")))
        assert worker.streams == 0


async def test_without_a_connection_each_request_has_its_stream() -> None:
    async with served() as (worker, streams, service):
        service.stop()
        worker.state = msgspec.structs.replace(worker.state, outputs="127.0.0.1:1")
        await worker.connect()
        assert worker.channel is None
        tokens, reason = await answer(worker, "r")
        assert (len(tokens), reason, streams.items) == (20, FinishReason.LENGTH, 20)


async def test_requests_on_a_lost_connection_are_told() -> None:
    async with served() as (worker, _, service):
        await worker.connect()
        asking = asyncio.ensure_future(answer(worker, "r", count=100))
        while not worker.tokens:
            await asyncio.sleep(0.001)
        next(iter(service._outputs._known.values()))._transport.abort()
        with pytest.raises(WorkerLost, match="closed the connection"):
            await asking
        while worker.channel is None or worker.channel.open:
            await asyncio.sleep(0.001)
        while (await worker.call(WorkerOp.INFO)).requests:
            await asyncio.sleep(0.001)
        # The next one does not wait for the connection.
        assert len((await answer(worker, "s"))[0]) == 20


async def test_errors_of_the_engine_come_over_the_connection() -> None:
    async with served() as (worker, streams, _):
        await worker.connect()
        twice = await asyncio.gather(answer(worker, "r"), answer(worker, "r"), return_exceptions=True)
        assert [type(found) for found in twice] == [tuple, SessionError]
        assert streams.items == 0


async def test_a_worker_with_a_secret_takes_no_stranger(
    tmp_path: Path, use_secret: Callable[[Path | None], None]
) -> None:
    async with served() as (worker, _, _):
        path = tmp_path / "secret"
        path.write_text("c0ffee" * 8)
        greeting = frame(Hello("x" * 32))
        use_secret(path)
        host, _, port = worker.state.outputs.partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(greeting)
        assert await reader.read() == b""
        writer.close()
        await worker.connect()
        assert worker.channel is not None and worker.channel.open


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff",
        frame(Hello("short")),
        frame(BATCH),
        frame(Hello("x" * 32)) * 2,
        b"\0\0\0\1\xc1",
    ],
)
async def test_whoever_says_anything_else_is_cut_off(data: bytes) -> None:
    async with served() as (worker, _, service):
        host, _, port = worker.state.outputs.partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(data)
        with pytest.raises((EOFError, ConnectionError)):
            while await reader.readexactly(1):
                pass
        writer.close()
        await asyncio.sleep(0)
        assert not service._outputs._known
        await worker.connect()
        assert (await answer(worker, "r"))[1] is FinishReason.LENGTH


async def test_a_worker_that_talks_nonsense_is_used_through_streams() -> None:
    async def nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"\0\0\0\2hi")
        await reader.read()
        writer.close()

    async with await asyncio.start_server(nonsense, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(WorkerLost, match="before the greeting"):
            await OutputChannel.connect("w", f"127.0.0.1:{port}")


def test_frames_are_put_together_however_they_are_cut() -> None:
    decoder = msgspec.msgpack.Decoder(Batch)
    data = frame(BATCH) + frame(Batch(())) + frame(BATCH)
    for size in range(1, len(data) + 1):
        frames = Frames(1 << 10)
        bodies = [body for at in range(0, len(data), size) for body in frames.feed(data[at : at + size])]
        assert [unframe(body, decoder) for body in bodies] == [BATCH, Batch(()), BATCH]
    with pytest.raises(InvalidRequest, match="at most 8"):
        list(Frames(8).feed(frame(BATCH)))
