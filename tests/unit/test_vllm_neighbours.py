# SPDX-License-Identifier: Apache-2.0
"""The migration connector beside vLLM's ``OffloadingConnector``, in one ``MultiConnector``."""

from __future__ import annotations

from typing import Any

import pytest

from components.engine.kv import Frozen, RequestId
from components.engine.vllm.control import Marker, Op
from tests.vllm_scheduler import Played, offer_of

pytest.importorskip("vllm")


@pytest.fixture
def played(tiny_llama: str) -> Played:
    return Played(tiny_llama, blocks=24, kv_offloading_size=0.01)


def offloading(output: Any) -> Any:
    """Its part of a step's metadata."""
    return output.kv_connector_metadata.metadata[1]


def finished(played: Played) -> set[int]:
    """A request that has ended while its prompt is still being offloaded; the jobs of that."""
    request = played.add(list(range(100, 260)), max_tokens=20)
    jobs: set[int] = set()
    while not request.is_finished():
        output = played.step()
        jobs |= set(offloading(output).store_jobs)
        assert not offloading(output).jobs_to_flush
    assert jobs
    return jobs


def test_blocks_of_a_landing_are_offloaded_before_anything_is_written_into_them(played: Played) -> None:
    stores = finished(played)
    played.land("r", 20 * 16)
    output = played.schedule()
    assert played.jobs(output) and offloading(output).jobs_to_flush == stores
    played.finish_step(output)


def test_a_commit_waits_for_a_step_when_it_has_got_blocks_that_are_still_read(played: Played) -> None:
    finished(played)
    request = played.add(list(range(1, 9)), Marker(RequestId("r"), 8, landing=offer_of("r", 0)), "r")
    tokens = tuple(range(300, 300 + 280))
    played.call(Op.COMMIT, request, frozen=Frozen(offer_of("r", 8 + len(tokens) - 1), tokens))
    assert not played.executor.jobs
    output = played.schedule()
    [job] = played.jobs(output)
    assert offloading(output).jobs_to_flush
    played.finish_step(output, played.done(job))
    assert request.request_id in played.step().num_scheduled_tokens


def test_a_commit_into_blocks_of_an_earlier_step_does_not_wait(played: Played) -> None:
    request = played.land("r", 100)
    played.step(played.done(*played.jobs(played.step())))
    played.commit(request)
    played.step()
    [job] = played.executor.jobs
    assert set(job.local_blocks) <= set(played.blocks(request))


def test_a_load_of_another_connector_ends_before_its_blocks_are_free(played: Played) -> None:
    finished(played)
    from vllm.v1.request import RequestStatus

    request = played.add(list(range(500, 600)))
    request.status = RequestStatus.WAITING_FOR_REMOTE_KVS
    played.scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)
    assert request.request_id not in played.scheduler.finished_recving_kv_req_ids
