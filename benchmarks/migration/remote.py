# SPDX-License-Identifier: Apache-2.0
"""A paged engine in another process, called over a pipe: what a worker's endpoints are in a served graph."""

from __future__ import annotations

import asyncio
import itertools
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from components.engine.paged import PagedEngine, PagedOptions
from components.engine.protocol import Frozen, GenerateOutput, GenerateRequest, KVOffer, LandingStatus, RequestId
from components.errors import MigrateError, RequestNotFound
from components.transfer.control.record import decode, encode

_ARGUMENTS: dict[str, Any] = {
    "meet": tuple[bytes],
    "generate": tuple[GenerateRequest],
    "landing_status": tuple[RequestId],
    "extend": tuple[RequestId, KVOffer, tuple[int, ...]],
    "commit": tuple[RequestId, Frozen],
    "stop": tuple[()],
}
"""Requests travel as msgpack, as they do between workers: the sampling options must be the same to the last byte."""


class Remote:
    """The driver's end."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._calls = itertools.count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._outputs: dict[RequestId, asyncio.Queue[GenerateOutput]] = {}

    async def meet(self, engine: PagedEngine) -> None:
        """Exchange the records of both agents, and connect them."""
        asyncio.get_running_loop().add_reader(self._pipe.fileno(), self._receive)
        agent = engine._live.agent
        peer = decode(await self._call("meet", encode(agent.record)))
        agent.directory.put(peer)
        await agent.warm_up(peer.ref)

    def outputs(self, request_id: RequestId) -> asyncio.Queue[GenerateOutput]:
        """What a request gives there."""
        return self._outputs.setdefault(request_id, asyncio.Queue())

    async def generate(self, request: GenerateRequest) -> None:
        """Start it; its outputs come into ``outputs``."""
        await self._call("generate", request)

    async def landing_status(self, request_id: RequestId) -> LandingStatus | None:
        """None while the request is not known there."""
        status: LandingStatus | None = await self._call("landing_status", request_id)
        return status

    async def extend(self, request_id: RequestId, offer: KVOffer, tokens: tuple[int, ...]) -> None:
        """See the protocol."""
        await self._call("extend", request_id, offer, tokens)

    async def commit(self, request_id: RequestId, frozen: Frozen) -> None:
        """See the protocol."""
        await self._call("commit", request_id, frozen)

    async def stop(self) -> None:
        """End the engine and its process."""
        await self._call("stop")
        asyncio.get_running_loop().remove_reader(self._pipe.fileno())

    async def _call(self, name: str, *arguments: Any) -> Any:
        number = next(self._calls)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._pipe.send((number, name, msgspec.msgpack.encode(arguments)))
        return await answer

    def _receive(self) -> None:
        while self._pipe.poll():
            number, request_id, value = self._pipe.recv()
            if request_id:
                self.outputs(request_id).put_nowait(value)
            elif isinstance(value, Exception):
                self._waiting.pop(number).set_exception(value)
            else:
                self._waiting.pop(number).set_result(value)


def target(pipe: Connection, options: PagedOptions) -> None:
    """Main of the other process."""
    asyncio.run(_serve(pipe, options))


async def _serve(pipe: Connection, options: PagedOptions) -> None:
    engine = PagedEngine(options)
    await engine.start()
    loop, over, tasks = asyncio.get_running_loop(), asyncio.Event(), set()

    async def stream(request: GenerateRequest) -> None:
        async for output in engine.generate(request):
            pipe.send((0, request.request_id, output))

    async def answer(number: int, name: str, data: bytes) -> None:
        value: Any = None
        arguments = msgspec.msgpack.decode(data, type=_ARGUMENTS[name])
        try:
            if name == "meet":
                engine._live.agent.directory.put(decode(arguments[0]))
                value = encode(engine._live.agent.record)
            elif name == "generate":
                start(stream(arguments[0]))
            elif name == "stop":
                over.set()
            else:
                value = await getattr(engine, name)(*arguments)
        except RequestNotFound:
            value = None
        except MigrateError as error:
            value = RuntimeError(f"{error.code}: {error}")
        pipe.send((number, "", value))

    def start(work: Any) -> None:
        task = asyncio.ensure_future(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    def receive() -> None:
        while pipe.poll():
            start(answer(*pipe.recv()))

    loop.add_reader(pipe.fileno(), receive)
    await over.wait()
    await engine.stop()
