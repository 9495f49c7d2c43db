# SPDX-License-Identifier: Apache-2.0
"""Requests keep their tokens whatever happens between workers; see ``tests.streams`` for the doubles."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from components.client import Workers
from components.engine.protocol import GenerateRequest, RequestId, Sampling
from components.migration.events import Event
from components.migration.messages import Mode, Owner
from components.migration.owners import Owners
from components.migration.peers import short
from components.worker.unrepeated import Unrepeated, handler_class
from tests.paged import engines
from tests.streams import Cluster, Wire

PROMPT = tuple(range(3, 24))
ENGINE: dict[str, Any] = {"step_s": 0.001, "num_blocks": 128}


@asynccontextmanager
async def cluster(
    count: int, seed: int = 0, faults: dict[str, float] | None = None, prefills: int = 0
) -> AsyncIterator[Cluster]:
    made = Cluster(uuid.uuid4().hex, seed, faults)
    await made.start(count, prefills, **ENGINE)
    try:
        yield made
    finally:
        await made.stop()


async def expected(prompts: list[tuple[int, ...]], sampling: Sampling) -> list[list[int]]:
    """Answers of one engine that nothing happens to."""
    async with engines(1, **ENGINE) as (engine,):
        answers = []
        for number, prompt in enumerate(prompts):
            request = GenerateRequest(RequestId(f"request-{number}"), prompt, sampling)
            answers.append([token async for output in engine.generate(request) for token in output.token_ids])
        return answers


async def test_an_unmoved_request_is_as_without_migration() -> None:
    sampling = Sampling(temperature=0.0, max_tokens=60)
    async with cluster(2) as workers:
        assert await workers.complete(PROMPT, sampling) == (await expected([PROMPT], sampling))[0]
        await workers.quiet()


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("mode", list(Mode))
async def test_moved_requests_keep_their_tokens(count: int, mode: Mode) -> None:
    """With two workers the old one relays to the end, with more of them the frontend repeats the request."""
    sampling = Sampling(temperature=0.9, seed=5, max_tokens=80)
    prompts = [(*PROMPT, 30 + n) for n in range(6)]
    async with cluster(count) as workers:
        answers = asyncio.gather(*(workers.complete(prompt, sampling) for prompt in prompts))
        moves = 0
        while not answers.done():
            await asyncio.sleep(0.005)
            record = await workers.move(mode)
            moves += record is not None and record.ok
        assert await answers == await expected(prompts, sampling)
        assert moves > 5
        await workers.quiet()


async def test_a_replay_goes_to_the_worker_that_was_named() -> None:
    sampling = Sampling(temperature=0.0, max_tokens=200)
    async with cluster(4) as workers:
        answer = asyncio.ensure_future(workers.complete(PROMPT, sampling))
        await asyncio.sleep(0.02)
        record = await workers.move(Mode.REPLAY)
        assert record is not None and record.ok and record.mode is Mode.REPLAY and not record.bytes
        [there] = [node for node in workers.nodes if short(node.instance) == record.target]
        assert [leg.request_id for leg in there.status.running()] == ["request-0"]
        assert await answer == (await expected([PROMPT], sampling))[0]
        await workers.quiet()


async def test_a_moved_request_is_relayed_while_no_prefill_worker_could_take_its_repeat() -> None:
    sampling = Sampling(temperature=0.0, max_tokens=80)
    async with cluster(4, prefills=1) as workers:
        answer = asyncio.ensure_future(workers.complete(PROMPT, sampling))
        await asyncio.sleep(0.02)
        # Discovery goes on listing it for a while.
        await workers.prefills[0].kill()
        record = await workers.move()
        assert record is not None and record.ok
        assert await answer == (await expected([PROMPT], sampling))[0]
        assert workers.repeats == 0
        await workers.quiet()


def test_an_announcement_that_a_later_one_has_overtaken_changes_nothing() -> None:
    owners = Owners(None, 1)  # type: ignore[arg-type]
    later, earlier = Owner(3, 30, moves=2), Owner(2, 20, moves=1)
    owners.learn([(RequestId("r"), later)])
    owners.learn([(RequestId("r"), earlier)])
    assert owners.get(RequestId("r")) == later


@pytest.mark.parametrize("seed", range(12))
async def test_a_killed_worker_costs_no_token(seed: int) -> None:
    """Moves at random, calls that are late, doubled or lose their answer, and one worker that dies in the middle."""
    sampling = Sampling(temperature=0.0, max_tokens=80)
    prompts = [(*PROMPT, 30 + n) for n in range(6)]
    async with cluster(4, seed, {"late": 0.1, "double": 0.1, "lost answer": 0.05}) as workers:
        answers = asyncio.gather(*(workers.complete(prompt, sampling) for prompt in prompts))
        death = workers.rng.randrange(3, 16)
        for step in range(10_000):
            if answers.done():
                break
            await asyncio.sleep(0.004)
            if step == death:
                await workers.rng.choice(workers.nodes).kill()
            asyncio.ensure_future(workers.move(workers.rng.choice([Mode.LIVE, Mode.LIVE, Mode.STOP_AND_COPY])))
        assert await answers == await expected(prompts, sampling)
        await workers.quiet()


async def test_a_drained_worker_gets_empty_and_its_clients_see_nothing() -> None:
    sampling = Sampling(temperature=0.0, max_tokens=90)
    prompts = [(*PROMPT, 30 + n) for n in range(5)]
    async with cluster(3) as workers:
        answers = asyncio.gather(*(workers.complete(prompt, sampling) for prompt in prompts))
        await asyncio.sleep(0.03)
        leaving = max(workers.nodes, key=lambda node: len(node.status.running()))
        await leaving.status.leave(5.0)
        assert not leaving.status.running()
        assert not leaving.requests.legs
        await leaving.kill()
        assert await answers == await expected(prompts, sampling)
        await workers.quiet()


async def test_workers_tell_where_a_request_is_what_is_relayed_and_how_often_it_has_moved() -> None:
    sampling = Sampling(temperature=0.0, max_tokens=600)
    async with cluster(2) as workers:
        first, second = workers.nodes
        answer = asyncio.ensure_future(workers.complete(PROMPT, sampling))
        while not first.status.left + second.status.left:
            await asyncio.sleep(0.001)
        client = Workers(Wire(first))
        for moves in (1, 2):
            await asyncio.sleep(0.02)
            assert (await workers.move()) is not None
            for node in workers.nodes:
                node.status._report._told_at = -10.0
            await client.refresh()
            [(owner, row)] = client.status().requests()
            assert (row.request_id, row.moves) == ("request-0", moves)
            relayed = [r for worker in client.status().workers for r in worker.requests if r.relayed_from]
            assert relayed and relayed[0].life != row.life
            assert client.status().moves[-1].target == owner.worker
        events = first.requests.events + second.requests.events
        assert events[Event.LANDED] == 2 and not events[Event.ORPHANED]
        assert await answer == (await expected([PROMPT], sampling))[0]
        await workers.quiet()


@pytest.mark.parametrize("mode", [Mode.LIVE, Mode.STOP_AND_COPY])
async def test_what_cannot_travel_stays_and_goes_on(mode: Mode) -> None:
    sampling = Sampling(temperature=0.0, max_tokens=300)
    async with cluster(3) as workers:
        answer = asyncio.ensure_future(workers.complete(PROMPT, sampling))
        while not (here := [leg for node in workers.nodes for leg in node.status.running()]):
            await asyncio.sleep(0.001)
        here[0].fixed = "a reason"
        record = await workers.move(mode)
        assert record is not None and (record.ok, record.code, record.reason) == (False, "not_migratable", "a reason")
        assert await answer == (await expected([PROMPT], sampling))[0]
        assert workers.repeats == 0
        await workers.quiet()


async def test_a_drain_goes_on_when_who_asked_for_it_is_gone() -> None:
    sampling = Sampling(temperature=0.0, max_tokens=90)
    prompts = [(*PROMPT, 30 + n) for n in range(5)]
    async with cluster(3) as workers:
        answers = asyncio.gather(*(workers.complete(prompt, sampling) for prompt in prompts))
        await asyncio.sleep(0.03)
        leaving = max(workers.nodes, key=lambda node: len(node.status.running()))
        asked = asyncio.ensure_future(leaving.status.drain(30.0))
        await asyncio.sleep(0)
        asked.cancel()
        # A second one waits for the first, and is told what that has moved.
        moves = await leaving.status.drain(5.0)
        assert moves and all(move.ok for move in moves) and not leaving.status.left
        assert await answers == await expected(prompts, sampling)
        await workers.quiet()


async def test_a_client_that_leaves_ends_its_request_wherever_it_runs() -> None:
    sampling = Sampling(temperature=0.0, max_tokens=90)
    async with cluster(2) as workers:
        answer = asyncio.ensure_future(workers.complete(PROMPT, sampling))
        await asyncio.sleep(0.02)
        record = await workers.move()
        assert record is not None and record.ok
        answer.cancel()
        await workers.quiet()


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        ({"routing": {"backend_instance_id": 7, "dp_rank": 0}}, "chosen the worker"),
        ({"extra_args": {"nvext": {"extra_fields": ["engine_data"]}}}, "engine_data"),
        # What the frontend writes itself when it has chosen a prefill worker.
        ({"routing": {"prefill_worker_id": 7, "dp_rank": 0}}, ""),
        ({"extra_args": {"nvext": {"extra_fields": ["timing"]}}, "nvext": None}, ""),
    ],
)
async def test_a_request_that_is_not_repeated_is_known_while_its_answer_lasts(
    request_: dict[str, Any], reason: str
) -> None:
    class Context:
        def id(self) -> str:
            return "this"

    class Stock:
        async def generate(self, request: dict[str, Any], context: Context) -> AsyncIterator[int]:
            yield 1

    unrepeated = Unrepeated()
    stream = handler_class(Stock, unrepeated)().generate(request_, Context())
    assert reason in unrepeated.why("this") and bool(reason) == bool(unrepeated.why("this"))
    assert [item async for item in stream] == [1]
    del stream
    assert unrepeated.why("this") == ""


async def test_what_the_frontend_does_not_repeat_is_relayed_to_its_end() -> None:
    sampling = Sampling(temperature=0.0, max_tokens=80)
    async with cluster(4) as workers:
        answer = asyncio.ensure_future(workers.complete(PROMPT, sampling, attached="tied to a worker"))
        await asyncio.sleep(0.02)
        for _ in range(3):
            record = await workers.move()
            assert record is not None and record.ok
        assert await answer == (await expected([PROMPT], sampling))[0]
        assert workers.repeats == 0
        await workers.quiet()
