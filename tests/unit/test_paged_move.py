# SPDX-License-Identifier: Apache-2.0
"""A request moves between two paged engines; its tokens equal those of an unmoved one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from components.engine.kv import Frozen, KVOffer, RequestId
from components.engine.paged import PagedEngine
from components.engine.protocol import FinishReason, GenerateOutput, GenerateRequest
from components.errors import IncompatibleLayout, NoRoom, RequestNotFound, SessionError
from tests.paged import collect, engines, request

R = RequestId("r")
COUNT = 40


async def unmoved(**more: object) -> list[int]:
    """Tokens of the request in one engine."""
    async with engines(1) as [engine]:
        return (await collect(engine.generate(request(count=COUNT, **more))))[0]  # type: ignore[arg-type]


async def take(stream: AsyncIterator[GenerateOutput], count: int) -> list[int]:
    """The next tokens of a stream."""
    return [token for _ in range(count) for token in (await anext(stream)).token_ids]


def landing(origin: GenerateRequest, tokens: tuple[int, ...], offer: KVOffer) -> GenerateRequest:
    """The request as the destination gets it."""
    fields = {name: getattr(origin, name) for name in origin.__struct_fields__}
    return GenerateRequest(**{**fields, "output_token_ids": tokens, "landing": offer})


async def landed(engine: PagedEngine) -> int:
    """Tokens that have landed, once no copy is under way."""
    while True:
        try:
            status = await engine.landing_status(R)
        except RequestNotFound:
            await asyncio.sleep(0.001)
            continue
        if not status.in_flight:
            assert status.error is None, status.error
            return status.landed_tokens
        await asyncio.sleep(0.001)


async def finish(src: PagedEngine, dst: PagedEngine, origin: GenerateRequest, frozen: Frozen) -> list[int]:
    """Stop-and-copy of a frozen request; the destination's tokens."""
    stream = dst.generate(landing(origin, frozen.output_token_ids, frozen.offer))
    first = asyncio.ensure_future(anext(stream))
    await landed(dst)
    await dst.commit(R, frozen)
    tokens = list((await first).token_ids)
    await src.release(R)
    return tokens + (await collect(stream))[0]


@pytest.mark.parametrize("sampling", [{}, {"seed": 7, "temperature": 0.7}], ids=["greedy", "seeded"])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 30])
async def test_stop_and_copy(length: int, sampling: dict[str, float]) -> None:
    expected = await unmoved(length=length, **sampling)
    async with engines(2) as [src, dst]:
        origin = request(length=length, count=COUNT, **sampling)
        stream = src.generate(origin)
        await take(stream, 5)
        frozen = await src.freeze(R)
        got = list(frozen.output_token_ids) + await finish(src, dst, origin, frozen)
        assert got == expected
        # No token was computed twice: the bytes came over.
        assert (await dst.report())[0].scheduled_prefill_tokens == 0
        assert (await collect(stream))[1] is FinishReason.FROZEN


@pytest.mark.parametrize("sampling", [{}, {"seed": 7}], ids=["greedy", "seeded"])
async def test_live(sampling: dict[str, float]) -> None:
    expected = await unmoved(length=30, **sampling)
    async with engines(2, step_s=0.005) as [src, dst]:
        origin = request(length=30, count=COUNT, **sampling)
        stream = src.generate(origin)
        got = await take(stream, 3)
        offer = await src.offer(R)
        there = dst.generate(landing(origin, tuple(got), offer))
        first = asyncio.ensure_future(anext(there))
        assert await landed(dst) == offer.num_tokens >= 28
        got += await take(stream, 8)
        await dst.extend(R, await src.offer(R), tuple(got))
        assert await landed(dst) > offer.num_tokens
        with pytest.raises(SessionError, match="differ"):
            await dst.extend(R, await src.offer(R), tuple(t + 1 for t in got))
        frozen = await src.freeze(R)
        await dst.commit(R, frozen)
        await dst.commit(R, frozen)
        tokens = list(frozen.output_token_ids) + list((await first).token_ids)
        await src.release(R)
        assert tokens + (await collect(there))[0] == expected
        await collect(stream)


async def test_replay_of_tokens_goes_on_exactly() -> None:
    expected = await unmoved(length=9, seed=2)
    async with engines(1) as [engine]:
        for known in (0, 1, 17):
            again = request(length=9, count=COUNT, seed=2, output_token_ids=tuple(expected[:known]))
            assert expected[:known] + (await collect(engine.generate(again)))[0] == expected


async def test_a_failed_move_gives_the_request_back() -> None:
    expected = await unmoved(length=30)
    async with engines(2, step_s=0.005) as [src, dst]:
        origin = request(length=30, count=COUNT)
        stream = src.generate(origin)
        got = await take(stream, 3)
        there = dst.generate(landing(origin, tuple(got), await src.offer(R)))
        first = asyncio.ensure_future(anext(there))
        await landed(dst)
        await dst.abort(R)
        assert (await first).finish_reason is FinishReason.CANCELLED
        await src.freeze(R)
        await src.resume(R)
        assert got + (await collect(stream))[0] == expected


async def test_a_destination_without_room_refuses_and_changes_nothing() -> None:
    async with engines(2, num_blocks=30, step_s=0.005) as [src, dst]:
        origin = request(length=100, count=15)
        stream = src.generate(origin)
        got = await take(stream, 2)
        full = dst.generate(request("full", 20, 60))
        await anext(full)
        with pytest.raises(NoRoom):
            await anext(dst.generate(landing(origin, tuple(got), await src.offer(R))))
        await dst.abort(RequestId("full"))
        await collect(full)
        assert len(got + (await collect(stream))[0]) == 15


async def test_other_block_sizes_are_refused() -> None:
    async with engines(1, step_s=0.005) as [src], engines(1, block_size=8) as [dst]:
        origin = request(length=30, count=COUNT)
        stream = src.generate(origin)
        got = await take(stream, 2)
        with pytest.raises(IncompatibleLayout):
            await anext(dst.generate(landing(origin, tuple(got), await src.offer(R))))
        await src.abort(R)
        await collect(stream)


async def test_a_source_that_was_preempted_in_between_leads_to_a_new_copy() -> None:
    expected = await unmoved(length=30)
    async with engines(2, step_s=0.005) as [src, dst]:
        origin = request(length=30, count=COUNT)
        stream = src.generate(origin)
        got = await take(stream, 3)
        offer = await src.offer(R)
        there = dst.generate(landing(origin, tuple(got), offer))
        first = asyncio.ensure_future(anext(there))
        await landed(dst)
        scheduler = src.parts.scheduler
        active = scheduler.get(R)
        scheduler.preempt(active)
        # Somebody else takes the blocks that were copied.
        taken = scheduler.pool.allocate(scheduler.pool.free)
        for plane in scheduler.kv.planes:
            plane[taken] = 77
        scheduler.pool.drop(taken)
        got += await take(stream, 3)
        frozen = await src.freeze(R)
        assert frozen.offer.generation > offer.generation
        await dst.commit(R, frozen)
        tokens = list(frozen.output_token_ids) + list((await first).token_ids)
        await src.release(R)
        assert tokens + (await collect(there))[0] == expected
        await collect(stream)
