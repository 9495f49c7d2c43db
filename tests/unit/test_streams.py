# SPDX-License-Identifier: Apache-2.0
"""Requests keep their tokens across all faults between workers; ``tests.streams`` has the doubles."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from components.client import Workers
from components.engine.kv import CommitTo, Frozen, LandingStatus, RequestId
from components.engine.protocol import GenerateOutput, GenerateRequest, Sampling
from components.errors import EngineKiller
from components.migration.events import Event
from components.migration.messages import Attached, Mode, Owner, Ticket, WorkerCall, WorkerOp
from components.migration.owners import Owners
from components.migration.peers import short
from components.migration.session import Limits, migrate
from components.worker.unrepeated import Unrepeated, handler_class
from tests.streams import Cluster, Node, Wire
from tests.virtual import virtual, virtual_agents

PROMPT = tuple(range(3, 24))
ENGINE: dict[str, Any] = {"step_s": 0.001, "num_blocks": 128}


@asynccontextmanager
async def cluster(
    count: int, seed: int = 0, faults: dict[str, float] | None = None, prefills: int = 0
) -> AsyncIterator[Cluster]:
    made = Cluster("streams", seed, faults)
    await made.start(count, prefills, agents=virtual_agents(seed), **ENGINE)
    try:
        yield made
    finally:
        await made.stop()


async def expected(prompts: list[tuple[int, ...]], sampling: Sampling) -> list[list[int]]:
    """Answers of one engine that nothing happens to."""
    async with cluster(1) as alone:
        engine, answers = alone.nodes[0].engine, []
        for number, prompt in enumerate(prompts):
            request = GenerateRequest(RequestId(f"request-{number}"), prompt, sampling)
            answers.append([token async for output in engine.generate(request) for token in output.token_ids])
        return answers


@virtual
async def test_an_unmoved_request_is_as_without_migration() -> None:
    sampling = Sampling(temperature=0.0, max_tokens=60)
    async with cluster(2) as workers:
        assert await workers.complete(PROMPT, sampling) == (await expected([PROMPT], sampling))[0]
        await workers.quiet()


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("mode", list(Mode))
@virtual
async def test_moved_requests_keep_their_tokens(count: int, mode: Mode) -> None:
    """With two workers the old one relays to the end, with more of them the frontend repeats the request."""
    sampling = Sampling(temperature=0.9, seed=5, max_tokens=120)
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


@pytest.mark.parametrize("mode", list(Mode))
@virtual
async def test_engines_are_told_whom_to_commit_to_unless_the_state_is_not_what_is_committed(mode: Mode) -> None:
    there, given = CommitTo("there:1", "epoch", RequestId("inside")), []
    async with cluster(2) as workers:
        answer = asyncio.ensure_future(workers.complete(PROMPT, Sampling(temperature=0.0, max_tokens=200)))
        for node in workers.nodes:
            node.engine.landing_status = _naming(node.engine.landing_status, there)  # type: ignore[method-assign]
            node.engine.freeze = _noting(node.engine.freeze, given)  # type: ignore[method-assign]
        await asyncio.sleep(0.02)
        record = await workers.move(mode)
        assert record is not None and record.ok
        assert given == [(None if mode is Mode.REPLAY else there, Limits().frozen_s)]
        await answer
        await workers.quiet()


def _naming(landing_status: Callable[..., Awaitable[LandingStatus]], there: CommitTo) -> Any:
    async def naming(engine_id: RequestId, *more: Any) -> LandingStatus:
        return msgspec.structs.replace(await landing_status(engine_id, *more), commit_to=there)

    return naming


def _noting(freeze: Callable[..., Awaitable[Frozen]], given: list[Any]) -> Any:
    async def noting(engine_id: RequestId, *more: Any) -> Frozen:
        given.append(more)
        return await freeze(engine_id, *more)

    return noting


@virtual
async def test_a_request_that_its_worker_has_not_committed_moves_nowhere() -> None:
    """Its engine may run it already."""
    async with cluster(3) as workers:
        node = workers.nodes[0]
        ticket = Ticket(RequestId("r"), 1, PROMPT, b"", node.requests.arrivals.fingerprint)
        node.requests.arrivals.reserve(ticket, None)
        leg = node.requests.arrivals.get(RequestId("r"), 1)
        leg.unread_since = None
        record = await migrate(node.requests, leg, workers.nodes[1].instance, Mode.LIVE, Limits())
        assert not record.ok and "still landing" in record.reason
        await node.requests.arrivals.give_up(leg)
        await workers.quiet()


@virtual
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


@virtual
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
    later, earlier = Owner(3, 30, order=(2,)), Owner(2, 20, order=(1, 5))
    owners.learn([(RequestId("r"), later)])
    owners.learn([(RequestId("r"), earlier)])
    assert owners.get(RequestId("r")) == later


@pytest.mark.parametrize("seed", range(12))
@virtual
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
            # Later only deadlines are waited for.
            await asyncio.sleep(0.004 if step < 250 else 0.25)
            if step == death:
                await workers.rng.choice(workers.nodes).kill()
            asyncio.ensure_future(workers.move(workers.rng.choice([Mode.LIVE, Mode.LIVE, Mode.STOP_AND_COPY])))
        assert await answers == await expected(prompts, sampling)
        await workers.quiet()


@virtual
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
                # Its table is old.
                now = node.status.table.clock() + 10.0
                node.status.table.clock = lambda now=now: now  # type: ignore[misc]
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
@virtual
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


@virtual
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
@virtual
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


@virtual
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


KILLER = (7, 7, 7)


def poison(workers: Cluster, at: int) -> list[Node]:
    """Every engine dies when a request that begins with ``KILLER`` has got its token ``at``. Those that have died."""
    died: list[Node] = []

    def poisoned(node: Node) -> Any:
        engine, generate = node.engine, node.engine.generate

        async def run(request: GenerateRequest) -> AsyncIterator[GenerateOutput]:
            made = len(request.prompt_token_ids) + len(request.output_token_ids)
            async for output in generate(request):
                made += len(output.token_ids)
                yield output
                if request.prompt_token_ids[: len(KILLER)] == KILLER and made >= at and node not in died:
                    died.append(node)
                    await engine.stop()

        return run

    for node in workers.nodes:
        node.engine.generate = poisoned(node)  # type: ignore[method-assign]
    return died


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("seed", range(4))
@virtual
async def test_a_request_that_kills_every_engine_it_reaches_reaches_two(seed: int, moved: bool) -> None:
    """The first engine dies, the request is repeated, the second dies, and the request ends with an error."""
    sampling = Sampling(temperature=0.0, max_tokens=80)
    prompts = [(*PROMPT, 30 + n) for n in range(6)]
    async with cluster(5, seed) as workers:
        died = poison(workers, len(KILLER) + 40)
        innocent = [asyncio.ensure_future(workers.complete(prompt, sampling)) for prompt in prompts]
        killer = asyncio.ensure_future(workers.complete(KILLER, sampling))
        if moved:
            name = RequestId(f"request-{len(prompts)}")
            while not (there := [n for n in workers.nodes if name in n.requests.legs and n.requests.legs[name].tokens]):
                await asyncio.sleep(0.001)
            assert (await there[0].status.move(WorkerCall(WorkerOp.MIGRATE, name))).ok
        with pytest.raises(EngineKiller, match="when 2 engines died"):
            await killer
        assert len(died) == 2
        for node in died:
            await node.kill()
        for answer, right in zip(innocent, await expected(prompts, sampling), strict=True):
            try:
                assert await answer == right
            except EngineKiller:
                # It was in both engines, too.
                continue
        await workers.quiet()


@virtual
async def test_a_client_follows_before_the_source_has_ended_its_stream() -> None:
    """The rest of a step at the source, which ends the stream, is not the client's to wait for."""
    sampling = Sampling(temperature=0.0, max_tokens=200)
    gate = asyncio.Event()
    async with cluster(2) as workers:
        for node in workers.nodes:
            node.engine.release = _late(node.engine.release, gate)  # type: ignore[method-assign]
        answer = asyncio.ensure_future(workers.complete(PROMPT, sampling))
        while not any(node.status.running() for node in workers.nodes):
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.02)
        move = asyncio.ensure_future(workers.move())
        assert await asyncio.wait_for(answer, 20) == (await expected([PROMPT], sampling))[0]
        assert not move.done()
        gate.set()
        record = await move
        assert record is not None and record.ok
        await workers.quiet()


def _late(release: Callable[[RequestId], Awaitable[None]], gate: asyncio.Event) -> Callable[[RequestId], Any]:
    async def late(engine_id: RequestId) -> None:
        await gate.wait()
        await release(engine_id)

    return late


@virtual
async def test_a_request_that_comes_back_is_read_without_a_network() -> None:
    sampling = Sampling(temperature=0.0, max_tokens=90)
    async with cluster(2) as workers:
        answer = asyncio.ensure_future(workers.complete(PROMPT, sampling))
        while not any(node.status.running() for node in workers.nodes):
            await asyncio.sleep(0.001)
        [home] = [node for node in workers.nodes if node.requests.legs]
        attached: list[int] = []
        plain = home.requests.peers.attach

        def attach(owner: Owner, *rest: Any) -> AsyncGenerator[Attached, None]:
            attached.append(owner.instance)
            return plain(owner, *rest)

        home.requests.peers.attach = attach  # type: ignore[method-assign]
        for _ in range(3):
            await asyncio.sleep(0.005)
            record = await workers.move()
            assert record is not None and record.ok, record and record.reason
        assert await answer == (await expected([PROMPT], sampling))[0]
        assert attached and home.instance not in attached
        await workers.quiet()
