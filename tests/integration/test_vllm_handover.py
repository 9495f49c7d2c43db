# SPDX-License-Identifier: Apache-2.0
"""Two real vLLM engines, real NIXL, real etcd: a moved request gives the tokens of an unmoved one."""

from __future__ import annotations

import asyncio
import socket

import msgspec
import pytest
from vllm import SamplingParams

from components.engine.kv import CommitTo, RequestId
from components.engine.protocol import FinishReason, GenerateRequest, Sampling
from components.engine.vllm import native
from components.errors import NotMigratable, RequestNotFound
from tests.integration.moves import (
    SAMPLINGS,
    Client,
    move,
    moved_to_and_fro,
    nothing_left,
    pair,
    request_of,
    run,
    status_of,
    take_until,
    taken_in,
)
from tests.integration.vllm_engines import Pair

__all__ = ["nothing_left", "pair"]
pytestmark = pytest.mark.integration


@pytest.mark.parametrize("live", [True, False], ids=["live", "stop-and-copy"])
@pytest.mark.parametrize("prompt", [5, 31, 64, 700])
@pytest.mark.parametrize("kind", list(SAMPLINGS))
def test_moved_to_and_fro_gives_the_same_tokens(
    runner: asyncio.Runner, pair: Pair, kind: str, prompt: int, live: bool
) -> None:
    moved_to_and_fro(runner, pair, kind, prompt, live)


@pytest.mark.parametrize("way", ["open", "cut", "silent"])
def test_engines_commit_directly_where_they_can_and_no_token_changes(
    runner: asyncio.Runner, pair: Pair, way: str
) -> None:
    """Of the two other ways one refuses connections and one accepts them without a word."""
    silent = socket.create_server(("127.0.0.1", 0))
    port = {"open": 0, "cut": 1, "silent": silent.getsockname()[1]}[way]

    def lead(to: CommitTo) -> CommitTo:
        return msgspec.structs.replace(to, address=f"127.0.0.1:{port}") if port else to

    async def scenario() -> None:
        sampling = SAMPLINGS["seeded"]
        moved = request_of(f"directly-{way}", 300, sampling)
        plain = await run(pair.a, GenerateRequest(RequestId("plain"), moved.prompt_token_ids, sampling))
        client, source, target = Client(), pair.a, pair.b
        stream: object = source.generate(moved)
        for stop in (6, 15, 27):
            await take_until(stream, client, stop)  # type: ignore[arg-type]
            stream = await move(source, target, moved, client, stream, True, lead=lead, late_s=0.1)
            assert (await target.landing_status(moved.request_id)).direct == (way == "open")
            source, target = target, source
        async for output in stream:  # type: ignore[attr-defined]
            client.take(output)
        assert client.tokens == plain.tokens

    with silent:
        runner.run(asyncio.wait_for(scenario(), 60))


def test_a_request_that_its_engines_have_moved_alone_goes_on_there_and_can_be_taken_back(
    runner: asyncio.Runner, pair: Pair
) -> None:
    async def scenario() -> None:
        request = request_of("taken back", 200, SAMPLINGS["seeded"])
        plain = await run(pair.b, request)
        client = Client()
        stream = pair.a.generate(request)
        await take_until(stream, client, 5)
        offer = await pair.a.offer(request.request_id)
        made = tuple(client.tokens)
        landing = pair.b.generate(
            GenerateRequest(request.request_id, request.prompt_token_ids, request.sampling, made, landing=offer)
        )
        waiting = asyncio.ensure_future(anext(landing))
        while not (status := await status_of(pair.b, request.request_id)).landed:
            await asyncio.sleep(0.01)
        await pair.a.freeze(request.request_id, status.commit_to, 30.0)
        while not (await status_of(pair.b, request.request_id)).direct:
            await asyncio.sleep(0.01)
        while not any(row.output_tokens > len(made) + 20 for row in (await pair.b.report())[1]):
            await asyncio.sleep(0.01)
        first = await waiting
        assert first.committed is not None and first.index == len(first.committed) >= len(made)
        assert [*first.committed, *first.token_ids] == plain.tokens[: first.index + len(first.token_ids)]
        await pair.a.resume(request.request_id)
        await pair.b.abort(request.request_id)
        assert [output async for output in landing][-1].finish_reason is FinishReason.CANCELLED
        async for output in stream:
            client.take(output)
        assert client.tokens == plain.tokens

    runner.run(asyncio.wait_for(scenario(), 60))


@pytest.mark.parametrize("kind", list(SAMPLINGS))
def test_replay_continues_with_the_same_tokens(runner: asyncio.Runner, pair: Pair, kind: str) -> None:
    async def scenario() -> None:
        request = request_of(f"replay-{kind}", 100, SAMPLINGS[kind])
        plain = await run(pair.a, request)
        again = GenerateRequest(
            RequestId(f"again-{kind}"), request.prompt_token_ids, request.sampling, tuple(plain.tokens[:13])
        )
        client = Client(tokens=list(plain.tokens[:13]))
        async for output in pair.b.generate(again):
            client.take(output)
        assert client.tokens == plain.tokens

    runner.run(asyncio.wait_for(scenario(), 60))


def test_a_request_that_nobody_marked_can_be_frozen_and_moved(runner: asyncio.Runner, pair: Pair) -> None:
    """What Dynamo's own worker sends to vLLM has no marker of ours."""

    async def scenario() -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        expected = await run(pair.a, request_of("unmarked", 300, SAMPLINGS["seeded"]))
        request = request_of("unmarked", 300, SAMPLINGS["seeded"])
        params = SamplingParams(
            temperature=0.9,
            top_p=0.95,
            seed=7,
            max_tokens=150,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        llm = pair.a.llm
        stream = llm.generate({"prompt_token_ids": list(request.prompt_token_ids)}, params, "unmarked")
        tokens: list[int] = []
        async for output in stream:
            tokens += output.outputs[0].token_ids
            if len(tokens) >= 10:
                break
        internal = RequestId(llm.output_processor.external_req_ids[request.request_id][-1])
        assert internal != request.request_id
        frozen = await pair.a.freeze(internal)
        target, first = await taken_in(pair.b, request, frozen)
        await llm.abort("unmarked")
        moved = Client(list(frozen.output_token_ids))
        moved.take(first)
        async for output in target:
            moved.take(output)
        assert moved.tokens == expected.tokens
        await stream.aclose()

    runner.run(asyncio.wait_for(scenario(), 60))


def test_frozen_request_resumes_as_if_nothing_had_happened(runner: asyncio.Runner, pair: Pair) -> None:
    async def scenario() -> None:
        request = request_of("resume", 200, SAMPLINGS["seeded"])
        plain = await run(pair.b, request)
        client = Client()
        stream = pair.a.generate(request)
        await take_until(stream, client, 10)
        frozen = await pair.a.freeze(request.request_id)
        assert frozen.output_token_ids == tuple(plain.tokens[: len(frozen.output_token_ids)])
        await asyncio.sleep(0.3)
        assert (await pair.a.freeze(request.request_id)) == frozen
        await pair.a.resume(request.request_id)
        async for output in stream:
            client.take(output)
        assert client.tokens == plain.tokens

    runner.run(asyncio.wait_for(scenario(), 60))


def test_caches_on_a_host_can_be_mapped_by_other_workers(pair: Pair) -> None:
    assert pair.a.info.lanes[0] == pair.b.info.lanes[0] == "shm/mapped"
    assert pair.a.info.fingerprint == pair.b.info.fingerprint


def test_what_cannot_travel_exactly_is_refused_with_the_reason(runner: asyncio.Runner, pair: Pair) -> None:
    async def scenario() -> None:
        request = request_of("prompt-logprobs", 20, Sampling(prompt_logprobs=1, max_tokens=30, ignore_eos=True))
        client = Client()
        stream = pair.a.generate(request)
        await take_until(stream, client, 3)
        with pytest.raises(NotMigratable, match="prompt_logprobs"):
            await pair.a.freeze(request.request_id)
        async for output in stream:
            client.take(output)
        assert len(client.tokens) == 30
        with pytest.raises(RequestNotFound):
            await pair.a.freeze(request.request_id)

    runner.run(asyncio.wait_for(scenario(), 60))


def test_a_commit_that_never_comes_stops_nobody(runner: asyncio.Runner, pair: Pair) -> None:
    async def scenario() -> None:
        neighbour = request_of("neighbour", 40, SAMPLINGS["greedy"])
        plain = await run(pair.b, neighbour)
        request = request_of("expected", 200, SAMPLINGS["greedy"])
        stream = pair.a.generate(request)
        await take_until(stream, Client(), 5)
        offer = await pair.a.offer(request.request_id)
        landing = pair.b.generate(
            GenerateRequest(request.request_id, request.prompt_token_ids, request.sampling, landing=offer)
        )
        waiting = asyncio.ensure_future(anext(landing))
        beside = asyncio.ensure_future(run(pair.b, neighbour))
        await asyncio.sleep(0.1)
        await pair.b.expect_commit(request.request_id, 60.0)
        await pair.b.abort(request.request_id)
        assert (await waiting).finish_reason is FinishReason.CANCELLED
        assert (await beside).tokens == plain.tokens
        await pair.a.abort(request.request_id)

    runner.run(asyncio.wait_for(scenario(), 60))


OWN_OPTIONS: dict[str, dict[str, object]] = {
    "flat_logprobs": {"flat_logprobs": True, "logprobs": 2},
    "stop": {"stop": ["no such text"], "detokenize": True},
    "routed_experts_prompt_start": {"routed_experts_prompt_start": 1},
}


@pytest.mark.parametrize("option", list(OWN_OPTIONS))
def test_options_of_vllms_own_are_served_and_keep_a_request_where_it_is(
    runner: asyncio.Runner, pair: Pair, option: str
) -> None:
    async def scenario() -> None:
        request = request_of(f"own-{option}", 40, SAMPLINGS["greedy"])
        plain = await run(pair.a, request)
        prompt = {"prompt_token_ids": list(request.prompt_token_ids)}
        params = SamplingParams(temperature=0.0, max_tokens=150, ignore_eos=True, **OWN_OPTIONS[option])  # type: ignore[arg-type]
        assert native.why_fixed(prompt, params, {})
        [*_, last] = [item async for item in pair.a.llm.generate(prompt, params, f"served-{option}")]
        assert list(last.outputs[0].token_ids) == plain.tokens

    runner.run(asyncio.wait_for(scenario(), 60))


def test_an_aborted_landing_leaves_no_block_behind(runner: asyncio.Runner, pair: Pair) -> None:
    async def scenario() -> None:
        request = request_of("abandoned", 400, SAMPLINGS["greedy"])
        client = Client()
        stream = pair.a.generate(request)
        await take_until(stream, client, 5)
        offer = await pair.a.offer(request.request_id)
        landing = pair.b.generate(
            GenerateRequest(
                request.request_id, request.prompt_token_ids, request.sampling, tuple(client.tokens), landing=offer
            )
        )
        waiting = asyncio.ensure_future(anext(landing))
        await asyncio.sleep(0.2)
        await pair.b.abort(request.request_id)
        assert (await waiting).finish_reason is FinishReason.CANCELLED
        async for output in stream:
            client.take(output)
        assert len(client.tokens) == 150

    runner.run(asyncio.wait_for(scenario(), 60))


def test_a_source_that_has_given_the_blocks_to_others_is_not_believed(runner: asyncio.Runner, pair: Pair) -> None:
    async def scenario() -> None:
        request = request_of("given away", 700, SAMPLINGS["greedy"])
        expected = await run(pair.a, request)
        stream = pair.a.generate(request)
        await take_until(stream, Client(), 5)
        frozen = await pair.a.freeze(request.request_id)
        await pair.a.abort(request.request_id)
        for number in range(6):
            others = request_of("x" * (number + 20), 1900, Sampling(temperature=0.0, max_tokens=2))
            await run(pair.a, others)
        before = (await pair.b.report())[0].kv_refused.get("integrity", 0)
        target, first = await taken_in(pair.b, request, frozen)
        client = Client(list(frozen.output_token_ids))
        client.take(first)
        async for output in target:
            client.take(output)
        assert client.tokens == expected.tokens
        assert (await pair.b.report())[0].kv_refused["integrity"] == before + 1

    runner.run(asyncio.wait_for(scenario(), 120))
