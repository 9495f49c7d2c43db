# SPDX-License-Identifier: Apache-2.0
"""Calls and streams between two workers that share messages; the way between them is played."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
import pytest

from components.engine.protocol import GenerateOutput, RequestId
from components.errors import InvalidRequest, MigrateError, NoRoom, RequestNotFound, SessionError, WorkerLost, from_code
from components.messages import pack
from components.migration import bundles
from components.migration.bundles import Calls, Outlets, Pipes, answered
from components.migration.messages import Attached, Piped, Replies, WorkerCall, WorkerOp, WorkerReply

PEER = 7


def call(name: str, op: WorkerOp = WorkerOp.LANDING) -> WorkerCall:
    return WorkerCall(op, RequestId(name))


class Way:
    """From a caller to worker ``PEER``, and its answers."""

    def __init__(self) -> None:
        self.calls, self.pipes = Calls(self.stream), Pipes(self.stream, self.asked)
        self.sent: list[WorkerOp] = []
        self.outlets = Outlets()
        self.cut = asyncio.Event()
        self.go: dict[str, asyncio.Event] = {}
        self.feeds: dict[str, asyncio.Queue[Attached | MigrateError | None]] = {}
        self.ended: Counter[str] = Counter()

    async def stream(self, instance: int, sent: WorkerCall) -> AsyncGenerator[Any, None]:
        assert instance == PEER
        self.sent.append(sent.op)
        kind: Any = WorkerReply
        try:
            if sent.op is WorkerOp.MANY:
                kind = Replies
                async with aclosing(answered(sent, self.reply)) as replies:
                    async for some in self.whole(replies):
                        yield pack(some)
            elif sent.op is WorkerOp.PIPE:
                kind = Piped
                async with aclosing(self.outlets.items(sent)) as items:
                    async for item in self.whole(items):
                        yield pack(item)
            else:
                yield pack(await self.reply(sent))
        except MigrateError as error:
            yield pack(kind(error=(error.code, str(error))))

    async def whole(self, items: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
        """Until the way is cut."""
        cut = asyncio.ensure_future(self.cut.wait())
        step: asyncio.Future[Any] | None = None
        try:
            while True:
                step = asyncio.ensure_future(anext(items))
                await asyncio.wait((step, cut), return_when=asyncio.FIRST_COMPLETED)
                if not step.done():
                    raise WorkerLost("the way is cut")
                try:
                    yield step.result()
                except StopAsyncIteration:
                    return
        finally:
            cut.cancel()
            if step is not None:
                step.cancel()
                await asyncio.gather(step, return_exceptions=True)

    async def asked(self, instance: int, sent: WorkerCall) -> WorkerReply:
        reply = await self.calls.ask(instance, sent)
        if reply.error is not None:
            raise from_code(*reply.error)
        return reply

    async def reply(self, sent: WorkerCall) -> WorkerReply:
        try:
            if sent.op is WorkerOp.ATTACH:
                await self.outlets.attach(sent, self.life(sent.request_id))
            elif sent.op is WorkerOp.DETACH:
                self.outlets.detach(sent)
            elif sent.request_id == "full":
                raise NoRoom("full")
            elif sent.request_id == "broken":
                raise ZeroDivisionError("broken")
            elif sent.request_id in self.go:
                await self.go[sent.request_id].wait()
        except MigrateError as error:
            return WorkerReply(error=(error.code, str(error)))
        return WorkerReply(left=len(sent.request_id))

    async def life(self, name: str) -> AsyncGenerator[Attached, None]:
        if name not in self.feeds:
            raise RequestNotFound(f"{name} is not here")
        yield Attached()
        try:
            while (item := await self.feeds[name].get()) is not None:
                if isinstance(item, MigrateError):
                    raise item
                yield item
        finally:
            self.ended[name] += 1

    def read(self, name: str) -> AsyncGenerator[Attached, None]:
        return self.pipes.attach(PEER, call(name, WorkerOp.ATTACH))


def tokens(*ids: int) -> Attached:
    return Attached((GenerateOutput(0, ids),))


async def opened(way: Way, *names: str) -> list[AsyncGenerator[Attached, None]]:
    for name in names:
        way.feeds[name] = asyncio.Queue()
    readers = [way.read(name) for name in names]
    assert await asyncio.gather(*(anext(reader) for reader in readers)) == [Attached()] * len(names)
    return readers


async def test_a_call_of_its_own_goes_at_once_and_calls_of_one_turn_go_together() -> None:
    way = Way()
    assert (await way.calls.ask(PEER, call("a"))).left == 1
    replies = await asyncio.gather(*(way.calls.ask(PEER, call("x" * n)) for n in range(1, 9)))
    assert [reply.left for reply in replies] == list(range(1, 9))
    assert way.sent == [WorkerOp.LANDING, WorkerOp.LANDING, WorkerOp.MANY]


async def test_a_slow_call_delays_no_other_one_of_its_bundle() -> None:
    way = Way()
    way.go["slow"] = asyncio.Event()
    waiting = [asyncio.ensure_future(way.calls.ask(PEER, call(name))) for name in ("a", "slow", "b", "c")]
    await asyncio.wait([waiting[0], *waiting[2:]], timeout=5.0)
    assert [future.done() for future in waiting] == [True, False, True, True]
    way.go["slow"].set()
    assert (await waiting[1]).left == 4


async def test_an_error_is_that_of_one_call() -> None:
    way = Way()
    names = ("a", "b", "full", "broken", "c")
    replies = await asyncio.gather(*(way.calls.ask(PEER, call(name)) for name in names))
    assert [reply.error for reply in replies] == [None, None, ("no_room", "full"), (MigrateError.code, "broken"), None]


async def test_all_calls_of_a_lost_bundle_are_lost() -> None:
    way = Way()
    way.go["slow"] = asyncio.Event()
    waiting = [asyncio.ensure_future(way.calls.ask(PEER, call(name))) for name in ("a", "slow", "b")]
    await asyncio.wait((waiting[0], waiting[2]), timeout=5.0)
    way.cut.set()
    with pytest.raises(WorkerLost):
        await waiting[1]


async def test_a_caller_that_gives_up_leaves_the_others() -> None:
    way = Way()
    way.go["slow"] = asyncio.Event()
    waiting = [asyncio.ensure_future(way.calls.ask(PEER, call(name))) for name in ("a", "slow", "slow")]
    await asyncio.sleep(0.01)
    waiting[1].cancel()
    way.go["slow"].set()
    assert (await waiting[2]).left == 4 and waiting[1].cancelled()


async def test_large_calls_are_not_gathered_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "_BUNDLE_BYTES", 1000)
    way = Way()
    replies = await asyncio.gather(*(way.calls.ask(PEER, call("x" * 400)) for _ in range(7)))
    assert [reply.left for reply in replies] == [400] * 7
    assert way.sent == [WorkerOp.LANDING, WorkerOp.MANY, WorkerOp.MANY]


@pytest.mark.parametrize("raw", [WorkerCall(WorkerOp.MANY), WorkerCall(WorkerOp.PIPE), None], ids=str)
async def test_a_bundle_that_cannot_be_answered_is_refused_whole(raw: WorkerCall | None) -> None:
    packed = [msgspec.Raw(msgspec.msgpack.encode(one)) for one in (call("a"), raw)]
    asked: list[WorkerCall] = []

    async def answer(sent: WorkerCall) -> WorkerReply:
        asked.append(sent)
        return WorkerReply()

    with pytest.raises(InvalidRequest):
        async for _ in answered(WorkerCall(WorkerOp.MANY, calls=tuple(packed)), answer):
            pass
    assert not asked


async def test_readers_of_one_worker_share_a_pipe_that_ends_with_the_last() -> None:
    way = Way()
    one, two = await opened(way, "one", "two")
    for name, token in (("two", 2), ("one", 1), ("two", 3)):
        way.feeds[name].put_nowait(tokens(token))
    assert [await anext(one), await anext(two), await anext(two)] == [tokens(1), tokens(2), tokens(3)]
    assert way.sent.count(WorkerOp.PIPE) == 1
    await one.aclose()
    await asyncio.sleep(0.01)
    assert way.ended == {"one": 1}
    way.feeds["two"].put_nowait(None)
    assert [item async for item in two] == []
    await asyncio.sleep(0.01)
    assert way.ended == {"one": 1, "two": 1} and not way.outlets._outlets
    (three,) = await opened(way, "three")
    assert way.sent.count(WorkerOp.PIPE) == 2
    await three.aclose()


async def test_an_error_of_one_life_ends_its_reader_alone() -> None:
    way = Way()
    one, two = await opened(way, "one", "two")
    way.feeds["one"].put_nowait(SessionError("a newer reader"))
    assert [item async for item in one] == [Attached(error=("session", "a newer reader"))]
    way.feeds["two"].put_nowait(tokens(5))
    assert await anext(two) == tokens(5)
    await two.aclose()


async def test_a_life_that_is_not_there_is_refused() -> None:
    way = Way()
    with pytest.raises(RequestNotFound, match="nobody"):
        await anext(way.read("nobody"))
    await asyncio.sleep(0.01)
    assert not way.outlets._outlets


async def test_the_end_of_a_pipe_is_the_end_of_its_readers() -> None:
    way = Way()
    one, two = await opened(way, "one", "two")
    way.feeds["one"].put_nowait(tokens(1))
    assert await anext(one) == tokens(1)
    way.cut.set()
    for reader in (one, two):
        with pytest.raises(WorkerLost):
            await anext(reader)
    assert way.ended == {"one": 1, "two": 1}
    way.cut.clear()
    (three,) = await opened(way, "three")
    await three.aclose()


async def test_a_reader_without_its_pipe_is_refused() -> None:
    way = Way()
    with pytest.raises(RequestNotFound, match="pipe"):
        await way.outlets.attach(call("one", WorkerOp.ATTACH), way.life("one"))
