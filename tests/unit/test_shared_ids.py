# SPDX-License-Identifier: Apache-2.0
"""Clients choose the ids of their requests (Dynamo takes them from a header): two that run at once may have one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from components.engine.kv import RequestId
from components.engine.protocol import FinishReason, GenerateOutput, GenerateRequest, Sampling
from components.migration.events import Event
from components.migration.faces import PROTOCOL_FACE
from components.migration.legs import Leg
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


@virtual
async def test_two_requests_with_one_id_at_a_worker_stay() -> None:
    """Calls of the engine name a request by its id, and vLLM ends all that have it."""
    release = asyncio.Event()

    async def engine() -> AsyncGenerator[GenerateOutput, None]:
        yield GenerateOutput(0, (7,))
        await release.wait()
        yield GenerateOutput(1, (8,), finish_reason=FinishReason.STOP)

    async with cluster(1) as workers:
        requests = workers.nodes[0].requests
        legs = [Leg(ID, ID, PROMPT, bytes) for _ in range(3)]
        streams = [requests.serve(leg, engine(), PROTOCOL_FACE) for leg in legs]
        for stream in streams[:2]:
            await anext(stream)
        assert {leg.fixed for leg in legs[:2]} == {"another request here has its id"}
        assert requests.legs == {ID: legs[0]}
        release.set()
        assert [[output.token_ids async for output in stream] for stream in streams[:2]] == [[(8,)], [(8,)]]
        await anext(streams[2])
        assert not legs[2].fixed and requests.legs == {ID: legs[2]}
        await streams[2].aclose()


async def _relayed(node: Node) -> list[int]:
    stream = node.handle(GenerateRequest(ID, PROMPT, FIRST), attached="a test")
    return [token async for output in stream for token in output.token_ids]
