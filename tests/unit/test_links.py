# SPDX-License-Identifier: Apache-2.0
"""Links between workers, over sockets of this host."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress

import msgspec
import pytest
import pytest_asyncio

from components import credentials
from components.address import Address
from components.engine.kv import RequestId, SocketRef
from components.engine.protocol import GenerateOutput
from components.errors import MigrateError, NoRoom, RequestNotFound, SessionError, Unauthorized, WorkerLost
from components.frames import framed
from components.handshake import connect
from components.migration import messages
from components.migration.link_owner import LinkOwner
from components.migration.link_wire import Said, purpose
from components.migration.links import Links
from components.migration.messages import Attached, WorkerCall, WorkerOp, WorkerReply

PEER = 7


def call(name: str, op: WorkerOp = WorkerOp.LANDING) -> WorkerCall:
    return WorkerCall(op, RequestId(name))


def links_owner(instance: int) -> messages.Owner:
    return messages.Owner(instance, 1)


def tokens(*ids: int) -> Attached:
    return Attached((GenerateOutput(0, ids),))


class Pair:
    """Worker ``PEER``, which answers, and a caller."""

    def __init__(self) -> None:
        self.links = Links(self.over_dynamo)
        self.owner = LinkOwner("127.0.0.1", self.answer, self.life)
        self.asked: list[WorkerOp] = []
        self.where: SocketRef | None = self.owner.where
        self.go: dict[str, asyncio.Event] = {}
        self.feeds: dict[str, asyncio.Queue[Attached | MigrateError | None]] = {}
        self.ended: Counter[str] = Counter()

    async def over_dynamo(self, instance: int, sent: WorkerCall) -> WorkerReply:
        assert instance == PEER
        self.asked.append(sent.op)
        return WorkerReply(link=self.where)

    async def answer(self, sent: WorkerCall) -> WorkerReply:
        if sent.request_id == "full":
            return WorkerReply(error=(NoRoom.code, "full"))
        if sent.request_id == "broken":
            raise ZeroDivisionError("broken")
        if sent.request_id in self.go:
            await self.go[sent.request_id].wait()
        return WorkerReply(left=len(sent.request_id))

    async def life(self, sent: WorkerCall) -> AsyncGenerator[Attached, None]:
        name = sent.request_id
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

    async def ask(self, name: str) -> int:
        return (await self.links.ask(PEER, call(name))).left

    async def opened(self, *names: str) -> list[AsyncGenerator[Attached, None]]:
        for name in names:
            self.feeds[name] = asyncio.Queue()
        readers = [self.links.attach(PEER, call(name, WorkerOp.ATTACH)) for name in names]
        assert await asyncio.gather(*(anext(reader) for reader in readers)) == [Attached()] * len(names)
        return readers

    def stranger(self) -> socket.socket:
        """A connection of somebody with the secret, who then says whatever he likes."""
        where = self.owner.where
        return connect(where.address, purpose(where.epoch), time.monotonic() + 5.0)


@pytest_asyncio.fixture
async def pair() -> AsyncIterator[Pair]:
    pair = Pair()
    yield pair
    pair.owner.acceptor.close()


async def until(happens: object, what: str = "") -> None:
    end = time.monotonic() + 10.0
    while not happens():  # type: ignore[operator]
        assert time.monotonic() < end, what
        await asyncio.sleep(0.01)


async def test_all_calls_go_over_one_link(pair: Pair) -> None:
    assert await asyncio.gather(*(pair.ask("x" * n) for n in range(1, 100))) == list(range(1, 100))
    assert await pair.ask("again") == 5
    assert pair.asked == [WorkerOp.LINK]


async def test_a_slow_call_delays_no_other_one(pair: Pair) -> None:
    pair.go["slow"] = asyncio.Event()
    waiting = [asyncio.ensure_future(pair.ask(name)) for name in ("a", "slow", "b")]
    await asyncio.wait((waiting[0], waiting[2]))
    assert not waiting[1].done()
    pair.go["slow"].set()
    assert await waiting[1] == 4


async def test_an_error_is_that_of_one_call(pair: Pair) -> None:
    replies = await asyncio.gather(*(pair.links.ask(PEER, call(name)) for name in ("a", "full", "broken", "b")))
    assert [reply.error for reply in replies] == [None, ("no_room", "full"), (MigrateError.code, "broken"), None]


async def test_a_caller_that_gives_up_leaves_the_others(pair: Pair) -> None:
    pair.go["slow"] = asyncio.Event()
    waiting = [asyncio.ensure_future(pair.ask("slow")) for _ in range(2)]
    await asyncio.sleep(0.05)
    waiting[0].cancel()
    pair.go["slow"].set()
    assert await waiting[1] == 4 and waiting[0].cancelled()


async def test_the_end_of_a_worker_ends_calls_and_readers_and_the_next_call_looks_for_it_again(pair: Pair) -> None:
    pair.go["slow"] = asyncio.Event()
    (reader,) = await pair.opened("one")
    waiting = asyncio.ensure_future(pair.ask("slow"))
    await asyncio.sleep(0.05)
    pair.owner.acceptor.close()
    for lost in (waiting, anext(reader)):
        with pytest.raises(WorkerLost):
            await lost
    await until(lambda: pair.ended["one"], "its reader there goes on")
    with pytest.raises(WorkerLost, match="cannot be reached"):
        await pair.ask("a")
    pair.owner = LinkOwner("127.0.0.1", pair.answer, pair.life)
    pair.where = pair.owner.where
    assert await pair.ask("a") == 1
    assert pair.asked == [WorkerOp.LINK] * 3


async def test_a_worker_without_links_is_said_to_have_none(pair: Pair) -> None:
    pair.where = None
    with pytest.raises(WorkerLost, match="takes no links"):
        await pair.ask("a")


async def test_another_process_at_that_address_is_found_out(pair: Pair) -> None:
    pair.where = SocketRef(pair.owner.where.address, "another epoch")
    with pytest.raises(Unauthorized):
        await pair.ask("a")


async def test_items_of_readers_come_in_order_and_a_reader_that_leaves_is_let_go(pair: Pair) -> None:
    one, two = await pair.opened("one", "two")
    for name, reader, token in (("two", two, 2), ("one", one, 1), ("two", two, 3)):
        pair.feeds[name].put_nowait(tokens(token))
        assert await anext(reader) == tokens(token)
    await one.aclose()
    await until(lambda: pair.ended == {"one": 1})
    pair.feeds["two"].put_nowait(None)
    assert [item async for item in two] == []


async def test_a_slow_reader_gets_what_has_come_together_and_in_order(pair: Pair) -> None:
    (reader,) = await pair.opened("one")
    moved = Attached(moved=links_owner(3))
    for item in (tokens(1), tokens(2), moved, tokens(4), None):
        pair.feeds["one"].put_nowait(item)
    await until(lambda: pair.ended["one"])
    await asyncio.sleep(0.05)
    both = Attached((*tokens(1).outputs, *tokens(2).outputs))
    assert [item async for item in reader] == [both, moved, tokens(4)]


async def test_an_error_of_one_life_ends_its_reader_alone(pair: Pair) -> None:
    one, two = await pair.opened("one", "two")
    pair.feeds["one"].put_nowait(SessionError("a newer reader"))
    assert [item async for item in one] == [Attached(error=("session", "a newer reader"))]
    pair.feeds["two"].put_nowait(tokens(5))
    assert await anext(two) == tokens(5)
    with pytest.raises(RequestNotFound, match="nobody"):
        await anext(pair.links.attach(PEER, call("nobody", WorkerOp.ATTACH)))


@pytest.mark.parametrize(
    "said",
    [
        b"\xff\xff\xff\xff",
        framed(b"\xc1"),
        framed(msgspec.msgpack.encode({"number": "one", "call": {}})),
        framed(msgspec.msgpack.encode(Said(1, call("slow")))) * 2,
    ],
    ids=["too long", "no message", "another message", "a number twice"],
)
async def test_who_says_anything_else_is_cut_off(pair: Pair, said: bytes) -> None:
    pair.go["slow"] = asyncio.Event()
    with await asyncio.to_thread(pair.stranger) as sock:
        sock.settimeout(10.0)
        sock.sendall(said)
        assert await asyncio.to_thread(sock.recv, 1) == b""
    assert await pair.ask("a") == 1


async def test_a_stranger_gets_nothing(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(credentials.VARIABLE, "the secret of the others")
    with socket.create_connection(Address.of(pair.owner.where.address), timeout=10.0) as sock:
        sock.sendall(framed(msgspec.msgpack.encode(Said(1, call("a")))) + bytes(64))
        data = b""
        with suppress(ConnectionResetError):
            while got := await asyncio.to_thread(sock.recv, 4096):
                data += got
    assert len(data) == 40
