# SPDX-License-Identifier: Apache-2.0
"""One paged engine: tokens follow from KV bytes, blocks come back, freeze and resume change nothing."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import msgspec
import pytest

from components.engine.kv import RequestId
from components.engine.paged import PagedOptions
from components.engine.paged.blocks import BlockPool
from components.engine.paged.engine import PagedEngine
from components.engine.paged.model import salt_of
from components.engine.protocol import FinishReason, RequestPhase, Sampling
from components.errors import ConfigError, InvalidRequest, NoRoom, NotMigratable, RequestNotFound, SessionError
from tests.paged import collect, engines, new_engine, request

R = RequestId("r")


async def alone(**more: object) -> list[int]:
    """Tokens of the request in an engine of its own."""
    async with engines(1) as [engine]:
        tokens, reason = await collect(engine.generate(request(**more)))  # type: ignore[arg-type]
        assert reason is FinishReason.LENGTH
        return tokens


async def test_the_same_request_gives_the_same_tokens_and_any_other_gives_others() -> None:
    first = await alone()
    assert len(first) == 20 and len(set(first)) > 5
    assert await alone() == first
    for change in ({"length": 11}, {"temperature": 0.5}, {"seed": 1}, {"presence_penalty": 0.1}, {"name": "other"}):
        assert (await alone(**change))[:10] != first[:10], change


@pytest.mark.parametrize("word", [0, 3])
@pytest.mark.parametrize("position", [0, 9, 12])
async def test_one_flipped_bit_of_kv_gives_wrong_tokens(word: int, position: int) -> None:
    expected = await alone()
    async with engines(1) as [engine]:
        stream = engine.generate(request())
        got = [(await anext(stream)).token_ids[0] for _ in range(4)]
        frozen = await engine.freeze(R)
        plane = engine.parts.scheduler.kv.planes[1]
        plane[frozen.offer.block_ids[position // 4], position % 4, word] ^= 1 << 17
        await engine.resume(R)
        rest, _ = await collect(stream)
        known = len(frozen.output_token_ids)
        assert (got + rest)[:known] == expected[:known]
        assert (got + rest)[known:] != expected[known:]


async def test_many_requests_share_the_engine_and_do_not_disturb_each_other() -> None:
    names = [f"r{i}" * (i + 1) for i in range(6)]
    expected = [await alone(name=name, seed=3) for name in names]
    async with engines(1, max_num_batched_tokens=7) as [engine]:
        streams = [collect(engine.generate(request(name, seed=3))) for name in names]
        assert [tokens for tokens, _ in await asyncio.gather(*streams)] == expected


async def test_preempted_requests_give_the_same_tokens() -> None:
    expected = [await alone(name="x" * i, count=40) for i in range(1, 5)]
    async with engines(1, num_blocks=30, max_model_len=60) as [engine]:
        streams = [collect(engine.generate(request("x" * i, count=40))) for i in range(1, 5)]
        assert [tokens for tokens, _ in await asyncio.gather(*streams)] == expected
        assert (await engine.report())[0].preemptions_total > 0


async def test_freeze_holds_still_and_resume_goes_on() -> None:
    expected = await alone(seed=5)
    async with engines(1) as [engine]:
        stream = engine.generate(request(seed=5))
        got = list((await anext(stream)).token_ids)
        frozen = await engine.freeze(R)
        assert await engine.freeze(R) == frozen
        assert [r.phase for r in (await engine.report())[1]] == [RequestPhase.FROZEN]
        await asyncio.sleep(0.02)
        assert await engine.freeze(R) == frozen
        await engine.resume(R)
        got += (await collect(stream))[0]
        assert got == expected
        assert tuple(expected[: len(frozen.output_token_ids)]) == frozen.output_token_ids


async def test_release_ends_the_stream_as_frozen() -> None:
    async with engines(1) as [engine]:
        stream = engine.generate(request())
        await anext(stream)
        await engine.freeze(R)
        await engine.release(R)
        assert (await collect(stream))[1] is FinishReason.FROZEN


@pytest.mark.parametrize("frozen", [False, True])
async def test_abort_gives_the_blocks_back(frozen: bool) -> None:
    async with engines(1) as [engine]:
        stream = engine.generate(request())
        await anext(stream)
        if frozen:
            await engine.freeze(R)
        await engine.abort(R)
        await engine.abort(R)
        assert (await collect(stream))[1] is FinishReason.CANCELLED
        with pytest.raises(RequestNotFound):
            await engine.freeze(R)


async def test_closing_the_stream_aborts_the_request() -> None:
    async with engines(1) as [engine]:
        async with aclosing(engine.generate(request(count=90))) as stream:  # type: ignore[type-var]
            await anext(stream)
        assert (await engine.report())[1] == []


async def test_an_owner_that_is_silent_loses_its_frozen_request() -> None:
    async with engines(1, lease_s=0.05) as [engine]:
        stream = engine.generate(request())
        await anext(stream)
        await engine.freeze(R)
        outputs = [output async for output in stream]
        assert outputs[-1].error is not None and outputs[-1].error[0] == "deadline"


async def test_what_cannot_run_is_refused_before_anything_started() -> None:
    async with engines(1) as [engine]:
        for wrong in (request(length=0), request(length=120), request(n=2)):
            with pytest.raises(InvalidRequest):
                await anext(engine.generate(wrong))
        stream = engine.generate(request(count=100))
        await anext(stream)
        with pytest.raises(SessionError, match="in use"):
            await anext(engine.generate(request()))
        await engine.abort(R)
        await collect(stream)


async def test_what_cannot_move_exactly_is_not_frozen() -> None:
    async with engines(1) as [engine]:
        stream = engine.generate(request(count=50, prompt_logprobs=1))
        await anext(stream)
        with pytest.raises(NotMigratable, match="prompt_logprobs"):
            await engine.freeze(R)
        await engine.abort(R)
        await collect(stream)


async def test_stop_tokens_logprobs_and_least_length() -> None:
    every = tuple(range(1000))
    async with engines(1) as [engine]:
        for least, made in ((0, 1), (8, 8)):
            sampled = request(logprobs=2, min_tokens=least, stop_token_ids=every)
            outputs = [o async for o in engine.generate(sampled)]
            assert len(outputs) == made and outputs[-1].finish_reason is FinishReason.STOP
            assert outputs[-1].stop_reason == outputs[-1].token_ids[0]
            assert all(len(o.logprobs) == 1 and o.logprobs[0].logprob < 0 for o in outputs)


async def test_stopping_the_engine_tells_its_streams() -> None:
    engine = new_engine("stop", "stopped")
    await engine.start()
    stream = engine.generate(request(count=100))
    await anext(stream)
    await engine.stop()
    await engine.stop()
    outputs = [output async for output in stream]
    assert outputs[-1].error is not None and outputs[-1].error[0] == "worker_lost"


@pytest.mark.parametrize(
    "wrong",
    [{"num_blocks": 0}, {"integrity": "none"}, {"max_model_len": 999}, {"words": 0}],
    ids=lambda w: next(iter(w)),
)
async def test_options_that_cannot_work_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        await new_engine("bad", "bad", **wrong).start()


def test_options_have_defaults() -> None:
    PagedEngine(PagedOptions({}))
    PagedOptions({}).validate()


# Blocks


def test_blocks_are_counted() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    with pytest.raises(NoRoom):
        pool.allocate(2)
    pool.hold(blocks[:1])
    pool.drop(blocks)
    assert pool.free == 3
    pool.drop(blocks[:1])
    with pytest.raises(SessionError, match="twice"):
        pool.drop(blocks[:1])


def test_a_request_s_last_blocks_are_given_away_first() -> None:
    pool = BlockPool(6)
    blocks = pool.allocate(4)
    pool.drop(blocks)
    assert pool.allocate(2) == [blocks[3], blocks[2]]


def test_tokens_depend_on_the_values_of_sampling_options() -> None:
    wire = msgspec.msgpack.decode(msgspec.msgpack.encode({"temperature": 1.0, "top_p": 1.0}), type=Sampling)
    assert salt_of(wire, 7) == salt_of(Sampling(), 7) == salt_of(Sampling(temperature=1), 7)
    assert salt_of(Sampling(temperature=0.9), 7) != salt_of(Sampling(), 7)
