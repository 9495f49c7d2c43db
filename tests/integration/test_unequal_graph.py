# SPDX-License-Identifier: Apache-2.0
"""A decode worker of two tensor-parallel ranks takes prompts from a prefill worker of one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.integration.dynamo_workers import Served, ask

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def test_a_decode_worker_of_two_ranks_answers_as_one_that_does_both(
    runner: asyncio.Runner, tmp_path: Path, tiny_llama: str, etcd_url: str
) -> None:
    asked = {"prompt": [50 + (7 * i * i) % 991 for i in range(300)], "max_tokens": 40, "ignore_eos": True}

    async def answer(served: Served, handoffs: bool) -> tuple[Any, ...]:
        await served.ready()
        async with aiohttp.ClientSession() as session:
            found = await ask(session, served, **asked)
        if handoffs:
            workers = await served.workers_client()
            await workers.refresh()
            states = workers.status().workers
            assert sum(state.handoffs.get("first_token_used", 0) for state in states) >= 1
            assert not any(state.stats.kv_refused for state in states if state.stats is not None)
        assert not found.errors
        return found.same()

    def run_with(roles: list[str]) -> tuple[Any, ...]:
        folder = tmp_path / roles[0]
        folder.mkdir()
        served = Served(folder, tiny_llama, etcd_url, roles, {"decode": 2})
        try:
            return runner.run(asyncio.wait_for(answer(served, len(roles) > 1), 300))
        finally:
            served.stop()

    assert run_with(["agg"]) == run_with(["prefill", "decode"])
