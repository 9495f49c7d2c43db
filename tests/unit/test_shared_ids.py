# SPDX-License-Identifier: Apache-2.0
"""Clients choose the ids of their requests (``x-request-id``): two that run at once may have one."""

from __future__ import annotations

import asyncio

import pytest

from components.engine.kv import RequestId
from components.engine.protocol import GenerateRequest, Sampling
from components.migration.events import Event
from components.migration.messages import Mode, WorkerCall, WorkerOp
from tests.streams import Node
from tests.unit.test_streams import PROMPT, cluster, expected
from tests.virtual import virtual

ID = RequestId("request-0")
FIRST = Sampling(temperature=0.0, max_tokens=300)
OTHER = Sampling(temperature=0.9, seed=7, max_tokens=40)


async def answer(node: Node, sampling: Sampling, prompt: tuple[int, ...] = PROMPT) -> list[int]:
    stream = node.handle(GenerateRequest(ID, prompt, sampling))
    return [token async for output in stream for token in output.token_ids]


@pytest.mark.parametrize("where", ["owner", "another"])
@virtual
async def test_a_new_request_with_the_id_of_one_that_has_moved_is_not_its_repeat(where: str) -> None:
    wanted = [(await expected([PROMPT], sampling))[0] for sampling in (FIRST, OTHER)]
    async with cluster(3) as workers:
        source, owner, another = workers.nodes
        # Relayed: the frontend of this test repeats nothing.
        first = asyncio.ensure_future(_relayed(source))
        await asyncio.sleep(0.02)
        call = WorkerCall(WorkerOp.MIGRATE, ID, target=owner.instance, mode=Mode.LIVE)
        assert (await source.status.move(call)).ok
        await asyncio.sleep(0.02)
        assert another.requests.owners.get(ID) is not None
        asked = owner if where == "owner" else another
        assert await answer(asked, OTHER) == wanted[1]
        assert not asked.requests.events[Event.ADOPTED] and not asked.requests.events[Event.PASSED_ON]
        assert await first == wanted[0]
        await workers.quiet()


async def _relayed(node: Node) -> list[int]:
    stream = node.handle(GenerateRequest(ID, PROMPT, FIRST), attached="a test")
    return [token async for output in stream for token in output.token_ids]
