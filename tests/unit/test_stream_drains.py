# SPDX-License-Identifier: Apache-2.0
"""Drains of workers: with room and without, with clients that read on, and among workers with other weights."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest

from components.engine.kv import RequestId
from components.engine.protocol import GenerateRequest, Sampling
from components.errors import NoRoom
from components.migration.messages import WorkerCall, WorkerOp
from components.worker import weights
from tests.streams import Cluster, Node
from tests.unit.test_streams import PROMPT, cluster, expected
from tests.virtual import virtual, virtual_agents


@asynccontextmanager
async def busy() -> AsyncIterator[Node]:
    """The busiest of three workers with five requests, whose answers come whole."""
    sampling = Sampling(temperature=0.0, max_tokens=90)
    prompts = [(*PROMPT, 30 + n) for n in range(5)]
    async with cluster(3) as workers:
        answers = asyncio.gather(*(workers.complete(prompt, sampling) for prompt in prompts))
        await asyncio.sleep(0.03)
        yield max(workers.nodes, key=lambda node: len(node.status.running()))
        assert await answers == await expected(prompts, sampling)
        await workers.quiet()


@virtual
async def test_a_drained_worker_gets_empty_and_its_clients_see_nothing() -> None:
    async with busy() as leaving:
        await leaving.status.leave(5.0)
        assert not leaving.status.running()
        assert not leaving.requests.legs
        await leaving.kill()


@virtual
async def test_a_drain_goes_on_when_who_asked_for_it_is_gone() -> None:
    async with busy() as leaving:
        asked = asyncio.ensure_future(leaving.status.drain(30.0))
        await asyncio.sleep(0)
        asked.cancel()
        # A second one waits for the first, and is told what has moved.
        moves = await leaving.status.drain(5.0)
        assert moves and all(move.ok for move in moves) and not leaving.status.left


class Reader:
    """A client at one worker, which notes when its tokens come."""

    def __init__(self, node: Node, request: GenerateRequest) -> None:
        self.tokens: list[int] = []
        self.times: list[float] = []
        self.done = asyncio.ensure_future(self._read(node, request))

    async def _read(self, node: Node, request: GenerateRequest) -> None:
        async with aclosing(node.handle(request, "tied to a worker")) as stream:
            async for output in stream:
                self.tokens += output.token_ids
                self.times += [asyncio.get_running_loop().time()] * len(output.token_ids)

    def longest_gap(self) -> float:
        return max(b - a for a, b in pairwise(self.times))


STEP_S = 0.01
WAY_S = 0.002
"""Two messages between workers, as ``Cluster.moment`` delays them at most."""


@pytest.mark.parametrize("lacks", ["seats", "blocks"])
@virtual
async def test_a_drain_into_a_full_cluster_costs_nobody_a_token_and_tries_nothing_in_a_loop(lacks: str) -> None:
    """What is drained goes on at full speed until there is room; then it leaves, within two steps each."""
    workers = Cluster("streams", 0)
    sizes = {"num_blocks": 600, "max_model_len": 400, "step_s": STEP_S, "vocab_size": 1000}
    await workers.start(2, agents=virtual_agents(), max_num_seqs=3, **sizes)
    source, target = workers.nodes
    long, short = (Sampling(temperature=0.0, max_tokens=count) for count in (300, 70 if lacks == "seats" else 30))
    mine = [Reader(source, GenerateRequest(RequestId(f"mine-{n}"), (*PROMPT, n), long)) for n in range(3)]
    count = 3 if lacks == "seats" else 1
    theirs = [Reader(target, GenerateRequest(RequestId(f"theirs-{n}"), (*PROMPT, 9, n), short)) for n in range(count)]
    await asyncio.sleep(10 * STEP_S)
    pool = target.engine.parts.scheduler.pool
    # Enough for the tokens that are still to come there, too few for another request.
    taken = pool.allocate(pool.free - 10 if lacks == "blocks" else 0)
    before = [len(reader.tokens) for reader in mine]
    draining = asyncio.ensure_future(source.status.drain(60.0))
    await asyncio.sleep(50 * STEP_S)
    assert all(len(reader.tokens) - made >= 0.95 * 50 for reader, made in zip(mine, before, strict=True))
    assert len(source.status.running()) == 3 and len(target.requests.arrivals.lives) == 0
    pool.drop(taken)
    moves = await draining
    assert len(moves) == 3 and all(move.ok for move in moves)
    await asyncio.gather(*(reader.done for reader in (*mine, *theirs)))
    assert all(len(reader.tokens) == 300 for reader in mine)
    assert max(reader.longest_gap() for reader in (*mine, *theirs)) <= 2 * STEP_S + WAY_S
    await workers.quiet()
    await workers.stop()


@virtual
async def test_a_worker_that_only_seems_to_have_room_is_asked_again_with_back_off() -> None:
    """The grant is refused each time: the request goes on decoding, and hardly anything is tried."""
    workers = Cluster("streams", 0)
    await workers.start(2, agents=virtual_agents(), num_blocks=128, step_s=STEP_S, vocab_size=1000)
    source, target = workers.nodes

    def refuse(*_: Any) -> None:
        raise NoRoom("somebody else was quicker")

    target.engine.parts.landings.reserve = refuse  # type: ignore[method-assign]
    reader = Reader(source, GenerateRequest(RequestId("r"), PROMPT, Sampling(temperature=0.0, max_tokens=90)))
    moves = await source.status.drain(5.0)
    await reader.done
    assert len(reader.tokens) == 90 and reader.longest_gap() <= 1.01 * STEP_S
    assert 1 <= len(moves) <= 3 and {move.code for move in moves} == {NoRoom.code}
    await workers.quiet()
    await workers.stop()


@virtual
async def test_a_drain_asks_for_as_many_blocks_as_the_request_holds_in_all_groups() -> None:
    sampling = Sampling(temperature=0.0, max_tokens=90)
    async with cluster(2) as workers:
        source, _ = workers.nodes
        reader = Reader(source, GenerateRequest(RequestId("r"), PROMPT, sampling))
        await asyncio.sleep(0.01)
        await source.status.report(WorkerCall(WorkerOp.STATUS))
        [leg] = source.status.running()
        held = source.status.table.blocks_of
        assert held(leg.engine_id) > 0
        source.status.table.blocks_of = lambda _: 10_000  # type: ignore[method-assign]
        assert await source.status.drain(0.02) == ()
        source.status.table.blocks_of = held  # type: ignore[method-assign]
        [move] = await source.status.drain(5.0)
        assert move.ok
        await reader.done
        await workers.quiet()


@virtual
async def test_requests_move_only_between_workers_of_the_same_weights() -> None:
    sampling = Sampling(temperature=0.0, max_tokens=80)
    async with cluster(3) as workers:
        first, other, same = workers.nodes
        told = await other.status.report(WorkerCall(WorkerOp.STATUS))
        other.status.become("other weights")
        again = await other.status.report(WorkerCall(WorkerOp.STATUS, since=told.version))
        assert again.info is not None and again.info.fingerprint == "other weights"
        same.status.paused = True
        assert (await same.status.report(WorkerCall(WorkerOp.STATUS))).cordoned
        reader = Reader(first, GenerateRequest(RequestId("r"), PROMPT, sampling))
        await asyncio.sleep(0.01)
        refused = await first.status.move(WorkerCall(WorkerOp.MIGRATE, RequestId("r"), target=first.instance))
        assert (refused.code, refused.reason) == ("invalid_request", "the request is already there")
        refused = await first.status.move(WorkerCall(WorkerOp.MIGRATE, RequestId("r"), target=other.instance))
        assert (refused.ok, refused.code) == (False, "invalid_request") and "weights" in refused.reason
        refused = await first.status.move(WorkerCall(WorkerOp.MIGRATE, RequestId("r"), target=same.instance))
        assert not refused.ok and "paused" in refused.reason
        same.status.paused = False
        # Without a destination of one's own choice: the one that can take it, however little room it has.
        taken = same.engine.parts.scheduler.pool.allocate(60)
        assert (await first.status.move(WorkerCall(WorkerOp.MIGRATE, RequestId("r")))).ok
        assert same.requests.arrivals.lives and not other.requests.arrivals.lives
        await reader.done
        same.engine.parts.scheduler.pool.drop(taken)
        await workers.quiet()


@virtual
async def test_a_worker_with_other_weights_is_not_seen_until_the_last_one_with_these_has_gone() -> None:
    async with cluster(4) as workers:
        for node, digest in zip(workers.nodes, ("old", "old", "new", ""), strict=True):
            node.state(weights=digest)
        first, second, new, silent = workers.nodes
        assert await weights.with_others(*first.status.kin) == [new.instance]
        # Nobody knows what it has.
        await asyncio.wait_for(weights.until_alone(*silent.status.kin), 1)
        waiting = asyncio.ensure_future(weights.until_alone(*new.status.kin))
        await asyncio.sleep(30)
        assert not waiting.done()
        await first.status.cordon()
        await asyncio.sleep(30)
        assert not waiting.done()
        await second.status.cordon()
        await asyncio.wait_for(waiting, 5)
        await workers.quiet()


@virtual
async def test_of_two_workers_with_different_weights_that_began_at_once_one_serves() -> None:
    async with cluster(2) as workers:
        for node, digest in zip(workers.nodes, ("old", "new"), strict=True):
            node.state(weights=digest)
        lower, higher = sorted(workers.nodes, key=lambda node: node.instance)
        await asyncio.wait_for(lower.status.give_way(), 1)
        waiting = asyncio.ensure_future(higher.status.give_way())
        await asyncio.sleep(30)
        assert higher.status.cordoned and not lower.status.cordoned and not waiting.done()
        await lower.status.cordon()
        await asyncio.wait_for(waiting, 5)
        assert not higher.status.cordoned
        await workers.quiet()
