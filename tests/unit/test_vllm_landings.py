# SPDX-License-Identifier: Apache-2.0
"""Real vLLM schedulers, step by step: seats, landings, rounds of copying and commits."""

from __future__ import annotations

from concurrent.futures import Future

import msgspec
import pytest

from components.engine.kv import Frozen
from components.engine.vllm.control import Op
from components.engine.vllm.records import JobResult, StepResults
from components.errors import NoRoom, RequestNotFound
from tests.unit.test_vllm_migration import end
from tests.vllm_scheduler import BLOCK, Played, offer_of


def test_frozen_requests_keep_their_seats(tiny_llama: str) -> None:
    played = Played(tiny_llama, max_num_seqs=2)
    first, second = played.add([1, 2, 3]), played.add([4, 5, 6])
    played.step()
    played.call(Op.FREEZE, first)
    third = played.add([7, 8, 9])
    assert list(played.step().num_scheduled_tokens) == [second.request_id]
    played.call(Op.RESUME, first)
    assert set(played.step().num_scheduled_tokens) == {first.request_id, second.request_id}
    played.call(Op.FREEZE, second)
    end(played, second)
    assert set(played.step().num_scheduled_tokens) == {first.request_id, third.request_id}


def test_landings_are_granted_seats_that_nobody_else_takes(tiny_llama: str) -> None:
    played = Played(tiny_llama, max_num_seqs=2)
    running = played.add([1, 2, 3])
    played.step()
    landed = played.land("landed", 50)
    for name in ("second", "third"):
        refused = played.land(name, 50)
        with pytest.raises(NoRoom):
            played.call(Op.LANDING, refused)
        end(played, refused)
    waiting = played.add([4, 5, 6])
    output = played.step()
    assert list(output.num_scheduled_tokens) == [running.request_id]
    played.step(played.done(*played.jobs(output)))
    played.commit(landed)
    assert set(played.step().num_scheduled_tokens) == {running.request_id, landed.request_id}
    assert waiting.num_output_tokens == 0


def test_landings_leave_the_blocks_that_prefills_need_as_long_as_these_need_them(tiny_llama: str) -> None:
    played = Played(tiny_llama, blocks=41, max_num_batched_tokens=4 * BLOCK)
    first = played.land("first", 2 * BLOCK)
    # Counted before this step, when no prefill needed any.
    prefill = played.add([9] * (30 * BLOCK))
    played.step(played.done(*played.jobs(played.step())))
    assert 0 < prefill.num_computed_tokens < 10 * BLOCK < (free := played.free) * BLOCK
    refused = played.land("refused", 12 * BLOCK)
    with pytest.raises(NoRoom):
        played.call(Op.LANDING, refused)
    end(played, prefill)
    assert played.free > free and played.call(Op.LANDING, refused).landing.reserved  # type: ignore[union-attr]
    end(played, refused)
    # One that has come with a part of its tokens needs the rest.
    part = played.land("part", 30 * BLOCK, generated=0, offer=offer_of("part", 2 * BLOCK))
    second = played.land("second", 12 * BLOCK)
    with pytest.raises(NoRoom):
        played.call(Op.LANDING, second)
    end(played, part)
    assert played.call(Op.LANDING, second).landing.reserved  # type: ignore[union-attr]
    for request in (first, second):
        end(played, request)
    played.check()


@pytest.mark.parametrize("tokens", [1, 5, BLOCK, 2 * BLOCK + 1])
def test_a_landing_without_kv_is_granted_a_seat(tiny_llama: str, tokens: int) -> None:
    played = Played(tiny_llama, max_num_seqs=2)
    running = played.add([1, 2, 3])
    played.step()
    landed = played.land("landed", tokens, generated=0, offer=offer_of("landed", 0))
    assert played.call(Op.LANDING, landed).landing.landed  # type: ignore[union-attr]
    played.add([4, 5, 6])
    played.step()
    played.commit(landed, tokens=0)
    assert set(played.step().num_scheduled_tokens) == {running.request_id, landed.request_id}


def test_a_commit_between_two_steps_runs_with_the_next_one(tiny_llama: str) -> None:
    played = Played(tiny_llama)
    request = played.land("moved", 50)
    output = played.step()
    played.step(played.done(*played.jobs(output)))
    played.commit(request)
    output = played.step()
    assert [job.remote_blocks for job in played.executor.jobs] == [(103,)]
    assert output.num_scheduled_tokens == {request.request_id: 1}
    assert [i.vllm_id for i in output.kv_connector_metadata.installs] == [request.request_id]
    assert list(request.output_token_ids) == [50, 7]


@pytest.mark.parametrize("wait_bytes", [0, 1 << 24], ids=["large", "late"])
def test_a_copy_that_takes_long_runs_beside_the_steps_of_others(tiny_llama: str, wait_bytes: int) -> None:
    played = Played(tiny_llama, wait_bytes=wait_bytes)
    played.executor.copied = lambda job, budget_s: None
    other = played.add([1, 2, 3])
    request = played.land("moved", 50)
    output = played.step()
    played.step(played.done(*played.jobs(output)))
    played.commit(request)
    output = played.step()
    (tail,) = played.executor.jobs or played.jobs(output)
    assert list(output.num_scheduled_tokens) == [other.request_id]
    assert list(played.step(played.done(tail)).num_scheduled_tokens) == [other.request_id]
    assert set(played.step().num_scheduled_tokens) == {other.request_id, request.request_id}


def test_a_source_that_was_late_is_not_waited_for_until_a_copy_has_come(tiny_llama: str) -> None:
    played = Played(tiny_llama)
    landed = [played.land(name, 50) for name in ("first", "second", "third")]
    played.step(played.done(*played.jobs(played.step())))
    played.executor.copied = lambda job, budget_s: None
    played.commit(landed[0])
    played.step()
    (late,) = played.executor.jobs
    played.commit(landed[1])
    (beside,) = played.jobs(played.step())
    assert played.executor.jobs == [late]
    played.step(played.done(late, beside))
    played.executor.copied = lambda job, budget_s: JobResult(job.job_id, ok=True)
    played.commit(landed[2])
    played.step()
    assert len(played.executor.jobs) == 2


def test_commits_between_two_steps_are_copied_together(tiny_llama: str) -> None:
    played = Played(tiny_llama)
    landed = [played.land(name, 50) for name in ("first", "second", "third")]
    played.step(played.done(*played.jobs(played.step())))
    played.executor.calls.clear()
    for request in landed:
        played.commit(request)
    end(played, landed[2])
    assert set(played.step().num_scheduled_tokens) == {request.request_id for request in landed[:2]}
    assert played.executor.calls == [2]
    for request in landed[:2]:
        end(played, request)
    played.check()


def test_a_round_that_the_commit_overtakes_is_followed_by_the_tail(tiny_llama: str) -> None:
    played = Played(tiny_llama)
    request = played.land("moved", 50)
    (first,) = played.jobs(played.step())
    played.commit(request)
    assert not played.executor.jobs
    played.step(played.done(first))
    output = played.step()
    (tail,) = played.jobs(output)
    assert (first.remote_blocks, tail.remote_blocks) == ((100, 101, 102), (103,))
    played.step(played.done(tail))
    assert played.step().num_scheduled_tokens == {request.request_id: 1}


def test_rounds_grow_with_the_source(tiny_llama: str) -> None:
    played = Played(tiny_llama)
    request = played.land("moved", 40)
    played.step(played.done(*played.jobs(played.step())))
    tokens = (40, *range(41, 70))
    played.call(Op.EXTEND, request, offer=offer_of("moved", 4 * BLOCK), tokens=tokens)
    (job,) = played.jobs(played.step())
    assert job.remote_blocks == (102, 103)
    played.step(played.done(job))
    played.commit(request)
    assert played.step().num_scheduled_tokens == {request.request_id: 1}
    assert tuple(request.output_token_ids)[:-1] == tokens


def test_blocks_of_a_source_that_was_preempted_prove_nothing(tiny_llama: str) -> None:
    played = Played(tiny_llama)
    request = played.land("moved", 50)
    played.step(played.done(*played.jobs(played.step())))
    played.call(Op.COMMIT, request, frozen=Frozen(offer_of("moved", 0, generation=1), (50,)))
    assert played.step().num_scheduled_tokens == {request.request_id: 50}
    assert not played.executor.jobs


def test_a_copy_that_failed_is_computed_from_the_last_good_block(tiny_llama: str) -> None:
    played = Played(tiny_llama)
    request = played.land("moved", 50)
    (job,) = played.jobs(played.step())
    bad = JobResult(job.job_id, ok=False, error=("integrity", "wrong"), bad_blocks=job.local_blocks[1:])
    played.step(StepResults([bad]))
    played.executor.copied = lambda job, _: JobResult(job.job_id, ok=False, bad_blocks=job.local_blocks)
    played.commit(request)
    assert played.step().num_scheduled_tokens == {request.request_id: 50}
    assert played.executor.jobs[0].remote_blocks == (100, 101, 102, 103)
    assert played.scheduler.migration.incoming.copies.refused == {"integrity": 1}


def test_all_ranks_must_have_copied(tiny_llama: str) -> None:
    played = Played(tiny_llama)
    played.executor.ranks = 2
    played.call(Op.INFO)
    two = offer_of("moved", 49)
    request = played.land("moved", 50, offer=msgspec.structs.replace(two, agents=two.agents * 2))
    (job,) = played.jobs(played.step())
    played.step(played.done(job))
    assert played.call(Op.LANDING, request).landing.in_flight  # type: ignore[union-attr]
    played.step(played.done(job))
    assert played.call(Op.LANDING, request).landing.landed  # type: ignore[union-attr]


@pytest.mark.parametrize("end_with", ["copied", "failed", "aborted"])
def test_who_waits_for_a_landing_is_answered_once_when_its_round_has_ended(tiny_llama: str, end_with: str) -> None:
    played = Played(tiny_llama)
    request = played.land("moved", 50)
    (job,) = played.jobs(played.step())
    waiting = played.call(Op.LANDING, request, hold_s=1.0)
    assert isinstance(waiting, Future) and not waiting.done()
    played.step()
    assert not waiting.done()
    if end_with == "aborted":
        end(played, request)
        assert isinstance(waiting.exception(0), RequestNotFound)
        return
    result = JobResult(job.job_id, ok=False, error=("timeout", "late"), bad_blocks=job.local_blocks)
    played.step(played.done(job) if end_with == "copied" else StepResults([result]))
    landing = waiting.result(0).landing
    assert landing is not None and landing.landed and (landing.error is None) == (end_with == "copied")
    # There is nothing more to wait for.
    assert played.call(Op.LANDING, request, hold_s=1.0).landing.landed  # type: ignore[union-attr]
    end(played, request)


def test_steps_that_only_wait_for_copies_tell_what_is_new_and_nothing_twice(tiny_llama: str) -> None:
    from vllm.v1.metrics.stats import PrefixCacheStats

    played = Played(tiny_llama)
    played.scheduler.log_stats = played.scheduler.kv_cache_manager.log_stats = True
    played.scheduler.kv_cache_manager.prefix_cache_stats = PrefixCacheStats()

    def told() -> int | None:
        """Requests that wait, as the step's message has it; None: there is none."""
        outputs = played.finish_step(played.schedule())
        return outputs[0].scheduler_stats.num_skipped_waiting_reqs if outputs else None

    first = played.land("first", 50)
    assert [told() for _ in range(4)] == [1, None, None, None]
    second = played.land("second", 50)
    assert [told() for _ in range(3)] == [2, None, None]
    end(played, first)
    assert [told() for _ in range(2)] == [1, None]
    running = played.add([1, 2, 3])
    assert [told() for _ in range(3)] == [1, 1, 1]
    end(played, running)
    end(played, second)
