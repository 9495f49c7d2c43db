# SPDX-License-Identifier: Apache-2.0
"""Leases of requests on the move: who renews one, who ends one, and who must not begin one."""

from __future__ import annotations

import asyncio

import pytest

from components.engine.protocol import FinishReason, GenerateRequest
from tests.virtual import virtual

pytest.importorskip("vllm")
from benchmarks.migration.sampled import native_of  # noqa: E402
from tests.unit.test_vllm_early_tokens import ONE, STATE, Engine, landing  # noqa: E402


@pytest.mark.parametrize("committed", [False, True])
@virtual
async def test_asking_for_the_landing_renews_a_lease_and_begins_none(committed: bool) -> None:
    engine = Engine(lease_s=10.0)
    stream, first = await landing(engine)
    if committed:
        await engine.commit(ONE, STATE)
    await asyncio.sleep(6.0)
    await engine.landing_status(ONE)
    await asyncio.sleep(6.0)
    assert not first.done()
    await asyncio.sleep(6.0)
    assert first.done() != committed
    engine.give(7, finish="length")
    assert (await first).finish_reason is (FinishReason.LENGTH if committed else FinishReason.ERROR)
    assert [output async for output in stream] == []


@pytest.mark.parametrize("lands", [False, True])
@virtual
async def test_resuming_ends_the_lease_of_a_frozen_request_and_not_of_one_that_still_lands(lands: bool) -> None:
    engine = Engine(lease_s=10.0)
    if lands:
        stream, first = await landing(engine)
    else:
        stream = engine.generate(native_of(GenerateRequest(ONE, (1, 2, 3)), 64))
        first = asyncio.ensure_future(anext(stream))  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        await engine.freeze(ONE)
    await engine.resume(ONE)
    await asyncio.sleep(30.0)
    assert first.done() == lands
    engine.give(7, finish="length")
    assert (await first).finish_reason is (FinishReason.ERROR if lands else FinishReason.LENGTH)
    assert [output async for output in stream] == []
