# SPDX-License-Identifier: Apache-2.0
"""Every deadline for a state with a lease ends before the lease.

Half of a lease stays unused, for messages on their way: no host knows the time of a message.
"""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from components import env
from components.engine.kv import Frozen, RequestId
from components.engine.protocol import GenerateRequest, Sampling
from components.engine.vllm.control import MARKER, Lent, Marker, Op, encode
from components.engine.vllm.migration import Settings
from components.messages import unpack
from components.migration import owners, suspects
from components.migration.messages import Handover, WorkerCall, WorkerOp
from components.migration.options import Options
from components.migration.session import _LANDING_S, Limits
from components.worker.settings import WorkerSettings
from tests.streams import Cluster
from tests.unit.test_handoff import frozen_of
from tests.unit.test_worker_handoff import output_of, worker
from tests.virtual import virtual, virtual_agents
from tests.vllm_scheduler import BLOCK, Played, offer_of

LEASES = (1.0, 10.0, 60.0, 600.0)


@pytest.mark.parametrize("lease_s", LEASES)
@pytest.mark.parametrize("step_s", [5.0, 20.0, 120.0])
def test_a_source_goes_on_by_itself_within_half_of_its_lease(lease_s: float, step_s: float) -> None:
    assert 0 < Limits(step_s, lease_s=lease_s).frozen_s <= lease_s / 2


@virtual
async def test_a_commit_says_for_how_long_the_frozen_blocks_are_there() -> None:
    workers = Cluster("leases", 0)
    await workers.start(2, agents=virtual_agents(), num_blocks=128, step_s=0.001, vocab_size=1000, lease_s=8.0)
    source, target = workers.nodes
    seen: list[WorkerCall] = []
    answer = target.control.answer

    async def note(call: WorkerCall) -> Any:
        seen.append(call)
        return await answer(call)

    target.control.answer = note  # type: ignore[method-assign]
    request = GenerateRequest(RequestId("r"), tuple(range(3, 24)), Sampling(max_tokens=80))
    stream = source.handle(request, "tied to a worker")
    await anext(stream)
    assert (await source.status.move(WorkerCall(WorkerOp.MIGRATE, request.request_id))).ok
    (frozen,) = [call.frozen for call in seen if call.frozen is not None]
    assert frozen.use_within_s == 4.0
    async for _ in stream:
        continue
    await workers.stop()


def test_a_prefill_worker_lends_for_twice_as_long_as_it_says() -> None:
    for lease_s in LEASES:
        lender, _, _, _ = worker(lease_s)
        item = output_of([7], "length")
        item.kv_transfer_params = {MARKER: encode(Lent(frozen_of(prompt=3)))}

        async def lend(lender: Any = lender, item: Any = item) -> None:
            lender.lent(item)
            await lender.release(frozen_of(prompt=3).offer.request_id)

        asyncio.run(lend())
        given = unpack(item.kv_transfer_params[MARKER], Handover)
        assert given.frozen is not None and given.frozen.use_within_s == lease_s / 2


@pytest.mark.parametrize("use_within_s", [0.0, 5.0, 1000.0])
def test_no_copy_of_a_destination_outlasts_what_the_source_has_said(tiny_llama: str, use_within_s: float) -> None:
    played = Played(tiny_llama, wait_bytes=0)
    request = played.land("moved", 50)
    (before,) = played.jobs(played.step())
    assert before.deadline_s == Settings().copy_deadline_s
    played.step(played.done(before))
    tokens = tuple(request.output_token_ids)
    frozen = Frozen(offer_of("moved", request.num_tokens - 1), tokens, use_within_s=use_within_s)
    played.call(Op.COMMIT, request, frozen=frozen)
    (tail,) = played.jobs(played.step())
    assert tail.deadline_s <= min(Settings().copy_deadline_s, use_within_s or Settings().copy_deadline_s)


@pytest.mark.parametrize("waited_s", [0.0, 20.0, 31.0])
def test_a_prompt_that_has_waited_in_line_for_too_long_is_computed_and_not_copied(
    tiny_llama: str, monkeypatch: pytest.MonkeyPatch, waited_s: float
) -> None:
    played = Played(tiny_llama)
    frozen = Frozen(offer_of("there", 3 * BLOCK), (7,), use_within_s=30.0)
    marker = Marker(RequestId("handed"), 3 * BLOCK, handoff=frozen)
    request = played.add([*range(3 * BLOCK), 7], marker, "handed")
    now = time.monotonic() + waited_s
    for module in ("handoff", "copies"):
        monkeypatch.setattr(f"components.engine.vllm.{module}.time", SimpleNamespace(monotonic=lambda: now))
    output = played.step()
    if waited_s > 30.0:
        assert not played.jobs(output) and request.request_id in output.num_scheduled_tokens
    else:
        (job,) = played.jobs(output)
        assert job.deadline_s <= 30.0 - waited_s
    # Not in what vLLM writes to its log when it crashes, either.
    assert MARKER not in (request.kv_transfer_params or {})


def test_what_is_announced_outlives_what_waits_for_it() -> None:
    settings, options = WorkerSettings({}), Options()
    assert settings.lease_s == Limits().lease_s == env.LEASE_S.default
    # A landing's lease is renewed by whoever asks for its progress.
    assert settings.lease_s > 2 * _LANDING_S
    # An adopted life is found by its record for as long as it is kept without a reader.
    assert options.orphan_s < owners.OWNER_S and options.orphan_s > owners._ANNOUNCE_S
    assert suspects._TELL_S < suspects.KEPT_S
