# SPDX-License-Identifier: Apache-2.0
"""Leases of requests on the move: no lease ends a committed request."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from components.engine.kv import LandingStatus, RequestId
from components.engine.vllm.control import Call, Reply
from components.engine.vllm.engine import VLLMEngine, _Live

ONE = RequestId("one")


class Engine(VLLMEngine):
    """Its core says yes."""

    async def _call(self, call: Call) -> Reply:
        return Reply(landing=LandingStatus(reserved=True))


@pytest.mark.parametrize("committed", [False, True])
async def test_asking_for_the_landing_renews_a_lease_and_begins_none(committed: bool) -> None:
    engine = Engine(None, lease_s=1000.0)
    live = engine._live[ONE] = _Live(ONE)
    engine._renew_lease(ONE)
    first = engine._leases._timers[live]
    if committed:
        frozen: Any = type("Frozen", (), {"output_token_ids": ()})
        await engine.commit(ONE, frozen)
    await engine.landing_status(ONE)
    assert first.cancelled()
    assert (live in engine._leases) != committed
    engine._drop(ONE)


@pytest.mark.parametrize("landing", [False, True])
async def test_resuming_ends_the_lease_of_a_frozen_request_and_not_of_one_that_still_lands(landing: bool) -> None:
    engine = Engine(None, lease_s=1000.0)
    live = engine._live[ONE] = _Live(ONE, landing=asyncio.Event() if landing else None)
    engine._renew_lease(ONE)
    await engine.resume(ONE)
    assert (live in engine._leases) == landing
    engine._drop(ONE)
