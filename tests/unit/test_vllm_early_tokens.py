# SPDX-License-Identifier: Apache-2.0
"""A landing whose first tokens come before its worker's commit.

They leave ``generate`` when the engine says that the source's engine has committed it; otherwise they wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from components.engine.kv import Frozen, LandingStatus, RequestId
from components.engine.protocol import FinishReason, GenerateOutput, GenerateRequest
from components.errors import NoRoom
from tests.vllm_scheduler import offer_of

pytest.importorskip("vllm")
from benchmarks.migration.sampled import native_of  # noqa: E402
from components.engine.vllm.control import COMMITTED, Call, Reply, encode  # noqa: E402
from components.engine.vllm.engine import VLLMEngine  # noqa: E402

ONE = RequestId("one")
STATE = Frozen(offer_of("one", 4), (5, 6))


class Engine(VLLMEngine):
    """Its core is played: ``give`` says what it has made."""

    def __init__(self, lease_s: float = 1000.0) -> None:
        super().__init__(LLM(self), lease_s)
        self.items: asyncio.Queue[Any] = asyncio.Queue()
        self.refuses = False

    async def _call(self, call: Call) -> Reply:
        if self.refuses:
            raise NoRoom("full")
        return Reply(landing=LandingStatus(reserved=True), frozen=STATE)

    def give(self, *tokens: int, finish: str | None = None, committed: tuple[int, ...] | None = None) -> None:
        sample = SimpleNamespace(token_ids=list(tokens), finish_reason=finish, stop_reason=None, logprobs=None)
        more = {"outputs": [sample], "finished": finish is not None, "num_cached_tokens": 0}
        told = None if committed is None else {COMMITTED: encode(committed)}
        self.items.put_nowait(SimpleNamespace(kv_transfer_params=told, **more))


class LLM:
    """The engine's client of its core."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def generate(self, *args: Any, **keywords: Any) -> AsyncGenerator[Any, None]:
        while True:
            item = await self._engine.items.get()
            yield item
            if item.finished:
                return

    async def abort(self, request_id: RequestId) -> None:
        self._engine.give(finish="abort")


async def landing(engine: Engine) -> tuple[AsyncIterator[GenerateOutput], asyncio.Future[GenerateOutput]]:
    """Its stream, and the first output, which is not there yet."""
    asked = GenerateRequest(ONE, (1, 2, 3), output_token_ids=(5,), landing=STATE.offer)
    stream = engine.generate(native_of(asked, 64))
    first: asyncio.Future[GenerateOutput] = asyncio.ensure_future(anext(stream))  # type: ignore[arg-type]
    await asyncio.sleep(0.01)
    return stream, first


async def test_tokens_wait_for_the_commit_and_are_counted_from_it() -> None:
    engine = Engine()
    stream, first = await landing(engine)
    engine.give(7)
    engine.give(8, finish="length")
    await asyncio.sleep(0.05)
    assert not first.done()
    await engine.commit(ONE, STATE)
    rest = [await first, *[output async for output in stream]]
    assert [(output.index, output.token_ids) for output in rest] == [(2, (7,)), (3, (8,))]
    assert rest[-1].finish_reason is FinishReason.LENGTH


async def test_tokens_leave_with_the_commit_of_the_sources_engine() -> None:
    engine = Engine(lease_s=0.05)
    stream, first = await landing(engine)
    engine.give(7, committed=(5, 6))
    output = await first
    assert (output.index, output.token_ids, output.committed) == (2, (7,), (5, 6))
    # Its worker's commit may come later, or never.
    await asyncio.sleep(0.1)
    engine.give(8, committed=(5, 6))
    second = await anext(stream)
    assert (second.index, second.token_ids, second.committed) == (3, (8,), None)
    await engine.commit(ONE, STATE)
    engine.give(9, finish="length")
    assert [(o.index, o.token_ids) async for o in stream] == [(4, (9,))]


async def test_a_workers_commit_that_is_refused_after_the_engines_stops_nothing() -> None:
    engine = Engine()
    stream, first = await landing(engine)
    engine.give(7, committed=(5, 6))
    await first
    engine.refuses = True
    with pytest.raises(NoRoom):
        await engine.commit(ONE, STATE)
    engine.give(8, finish="length")
    assert [(o.index, o.token_ids) async for o in stream] == [(3, (8,))]


@pytest.mark.parametrize("finished", [False, True], ids=["still running", "finished"])
async def test_a_landing_that_is_ended_before_its_commit_has_given_nothing(finished: bool) -> None:
    engine = Engine()
    stream, first = await landing(engine)
    engine.give(7, finish="length" if finished else None)
    await asyncio.sleep(0.05)
    await engine.abort(ONE)
    output = await first
    assert output.finish_reason is FinishReason.CANCELLED and not output.token_ids
    assert [output async for output in stream] == []


async def test_a_landing_whose_commit_never_comes_ends_by_its_lease() -> None:
    engine = Engine(lease_s=0.05)
    stream, first = await landing(engine)
    engine.give(7)
    output = await first
    assert output.finish_reason is FinishReason.ERROR and not output.token_ids
    assert [output async for output in stream] == []


async def test_a_commit_that_is_refused_lets_nothing_out() -> None:
    engine = Engine()
    _, first = await landing(engine)
    engine.refuses = True
    with pytest.raises(NoRoom):
        await engine.commit(ONE, STATE)
    engine.give(7)
    await asyncio.sleep(0.05)
    assert not first.done()
    await engine.abort(ONE)
    assert not (await first).token_ids


async def test_an_end_without_tokens_needs_no_commit() -> None:
    engine = Engine()
    _, first = await landing(engine)
    engine.give(finish="error")
    assert (await first).finish_reason is FinishReason.ERROR
