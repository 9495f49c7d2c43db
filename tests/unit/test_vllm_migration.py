# SPDX-License-Identifier: Apache-2.0
"""Real vLLM schedulers, step by step: requests are frozen, reserved and committed in every order."""

from __future__ import annotations

import random
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from components.engine.kv import Frozen
from components.engine.vllm.control import Op, Reply
from components.engine.vllm.records import JobResult, StepResults
from components.errors import NoRoom, NotMigratable, RequestNotFound, SessionError
from tests.vllm_scheduler import BLOCK, Played, offer_of

pytest.importorskip("vllm")
ABORTED = "FINISHED_ABORTED"


def end(played: Played, request: Any) -> None:
    from vllm.v1.request import RequestStatus

    played.scheduler.finish_requests(request.request_id, RequestStatus[ABORTED])


def everything_is_free(played: Played) -> bool:
    played.check()
    return played.free == played.scheduler.migration.port.num_blocks - 1


def test_a_request_that_nobody_marked_is_frozen_and_goes_on(tiny_llama: str) -> None:
    played = Played(tiny_llama)
    request = played.add(list(range(40)), name="plain")
    played.step()
    frozen = played.call(Op.FREEZE, "plain").frozen  # type: ignore[union-attr]
    assert frozen.output_token_ids == (7,) and frozen.offer.num_tokens == 40
    assert not played.step().num_scheduled_tokens
    assert not played.scheduler.has_requests(), "a frozen request must not keep the engine stepping"
    played.call(Op.RESUME, request)
    assert played.step().num_scheduled_tokens == {request.request_id: 1}
    end(played, request)
    with pytest.raises(RequestNotFound):
        played.call(Op.FREEZE, "plain")
    assert everything_is_free(played)


def test_a_call_by_the_internal_id_does_not_reach_the_next_life(tiny_llama: str) -> None:
    played = Played(tiny_llama)
    first = played.add([1, 2, 3], name="twice")
    end(played, first)
    second = played.add([1, 2, 3], name="twice")
    with pytest.raises(RequestNotFound):
        played.call(Op.OFFER, first)
    played.call(Op.OFFER, second)
    played.call(Op.OFFER, "twice")


def test_a_name_that_two_requests_have_means_the_older_one(tiny_llama: str) -> None:
    """Clients choose names. One that comes while the older one moves is not mistaken for it."""
    played = Played(tiny_llama)
    first = played.add(list(range(40)), name="twice")
    second = played.add(list(range(100, 120)), name="twice")
    played.step()
    frozen = played.call(Op.FREEZE, "twice").frozen  # type: ignore[union-attr]
    assert frozen.offer.num_tokens == 40, "the other's KV and tokens would go on behind this one's prompt"
    played.call(Op.RESUME, "twice")
    end(played, first)
    assert played.call(Op.FREEZE, "twice").frozen.offer.num_tokens == 20  # type: ignore[union-attr]
    played.call(Op.RESUME, "twice")
    end(played, second)
    assert everything_is_free(played)


def test_a_step_in_flight_ends_before_the_state_is_complete(tiny_llama: str) -> None:
    played = Played(tiny_llama, "AsyncMigrationScheduler")
    request = played.add(list(range(20)))
    played.step()
    under_way = played.schedule()
    answer = played.call(Op.FREEZE, request)
    assert isinstance(answer, Future) and not answer.done()
    assert not played.schedule().num_scheduled_tokens
    played.finish_step(under_way)
    reply = answer.result(0)
    assert reply.frozen is not None and reply.frozen.output_token_ids == (7, 7)
    assert reply.frozen.offer.num_tokens == 21


def test_resuming_ends_a_freeze_that_waits(tiny_llama: str) -> None:
    played = Played(tiny_llama, "AsyncMigrationScheduler")
    request = played.add(list(range(20)))
    under_way = played.schedule()
    answer = played.call(Op.FREEZE, request)
    played.call(Op.RESUME, request)
    assert isinstance(answer, Future)
    with pytest.raises(SessionError):
        answer.result(0)
    played.finish_step(under_way)
    assert played.step().num_scheduled_tokens == {request.request_id: 1}


def test_a_request_that_finishes_with_the_step_is_not_frozen(tiny_llama: str) -> None:
    played = Played(tiny_llama, "AsyncMigrationScheduler")
    request = played.add(list(range(20)), max_tokens=1)
    under_way = played.schedule()
    answer = played.call(Op.FREEZE, request)
    played.finish_step(under_way)
    assert isinstance(answer, Future)
    with pytest.raises(RequestNotFound):
        answer.result(0)
    assert everything_is_free(played)


def test_what_would_be_lost_is_refused(tiny_llama: str) -> None:
    played = Played(tiny_llama)
    request = played.add([1, 2, 3], prompt_logprobs=1)
    with pytest.raises(NotMigratable):
        played.call(Op.FREEZE, request)
    report = played.call(Op.REPORT)
    assert isinstance(report, Reply) and report.requests[0].not_migratable


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("block_size", 2 * BLOCK, "blocks have 32 tokens"),
        ("agents", (), "of 0 tensor-parallel ranks, ours are 1"),
        ("block_ids", (100,), "1 blocks for 49 tokens"),
    ],
)
def test_an_offer_that_cannot_be_used_harms_nobody(tiny_llama: str, field: str, value: Any, reason: str) -> None:
    played = Played(tiny_llama)
    good = offer_of("moved", 49)
    bad = msgspec.structs.replace(good, **{field: value})
    request = played.land("moved", 50, offer=bad)
    played.step()
    calls = [(Op.LANDING, {}), (Op.EXTEND, {"offer": bad}), (Op.COMMIT, {"frozen": Frozen(bad, (50,))})]
    for op, fields in calls:
        with pytest.raises(SessionError, match=reason):
            played.call(op, request, **fields)
    played.call(Op.EXTEND, request, offer=good, tokens=(50,))
    with pytest.raises(SessionError, match="max_model_len"):
        played.call(Op.COMMIT, request, frozen=Frozen(good, (50,) * 500))
    end(played, request)
    assert everything_is_free(played)


@pytest.mark.parametrize(
    ("tokens", "computed", "state", "reason"),
    [
        ((50, 10**6), 50, {}, "not in the model's vocabulary"),
        ((50, -1), 50, {}, "not in the model's vocabulary"),
        ((50, 51), 52, {}, "offer has 52 tokens, the request 51"),
        ((50, 51), -1, {}, "has -1 tokens"),
        ((50, 51), 50, {"checksums": (1,), "checked": (5,)}, "checksums"),
        ((50, 51), 50, {"checksums": (1, 2), "checked": (3,)}, "checksums"),
        ((50, 51), 50, {"checksums": (1, 2), "checked": (1, 1)}, "checksums"),
    ],
)
def test_a_state_that_would_end_the_step_is_refused_and_changes_nothing(
    tiny_llama: str, tokens: tuple[int, ...], computed: int, state: dict[str, Any], reason: str
) -> None:
    played = Played(tiny_llama)
    request = played.land("moved", 50)
    played.step(played.done(*played.jobs(played.step())))
    offer = offer_of("moved", 50)
    with pytest.raises(SessionError, match=reason):
        wrong = msgspec.structs.replace(offer, num_tokens=computed)
        played.call(Op.COMMIT, request, frozen=Frozen(wrong, tokens, **state))
    played.call(Op.COMMIT, request, frozen=Frozen(offer, (50, 52), checksums=(1, 2), checked=(2,)))
    assert played.step().num_scheduled_tokens == {request.request_id: 1}
    assert list(request.output_token_ids)[:2] == [50, 52]
    end(played, request)
    played.step()
    assert everything_is_free(played)


@pytest.mark.parametrize("state", [b"\x01" * 8, b"\xff" * 5056], ids=["too short", "no such state"])
def test_a_generator_whose_state_cannot_be_used_is_that_of_the_seed(state: bytes) -> None:
    import torch
    from vllm import SamplingParams

    from components.engine.vllm.compat.runners import RunnerV1
    from components.engine.vllm.records import Install

    def entered(rng_state: bytes) -> torch.Generator:
        sizes = {"sampler": SimpleNamespace(use_fp64_gumbel=True), "input_batch": SimpleNamespace(vocab_size=100)}
        runner = SimpleNamespace(requests={}, device=torch.device("cpu"), uses_mrope=False, **sizes)
        params = SamplingParams(seed=5, temperature=1.0)
        RunnerV1(runner).import_state(Install("r", [1, 2], [3, 4], params, None, rng_state))
        generator: torch.Generator = runner.requests["r"].generator
        return generator

    assert torch.equal(entered(state).get_state(), entered(b"").get_state())


@pytest.mark.parametrize("wait_bytes", [0, 1 << 24], ids=["beside the steps", "between them"])
def test_an_abort_after_the_commit_leaves_no_copy_behind(tiny_llama: str, wait_bytes: int) -> None:
    played = Played(tiny_llama, wait_bytes=wait_bytes)
    request = played.land("moved", 50)
    played.step(played.done(*played.jobs(played.step())))
    played.commit(request)
    end(played, request)
    assert everything_is_free(played)
    assert not played.jobs(played.step())


def test_a_copy_under_way_keeps_the_blocks_of_an_aborted_request(tiny_llama: str) -> None:
    played = Played(tiny_llama)
    request = played.land("moved", 50)
    (job,) = played.jobs(played.step())
    end(played, request)
    assert not everything_is_free(played)
    assert played.scheduler.has_requests(), "somebody has to collect the result"
    other = played.add(list(range(200)))
    output = played.step(played.done(job))
    assert output.kv_connector_metadata.cancelled == [job.job_id]
    assert not set(job.local_blocks) & set(played.blocks(other))
    end(played, other)
    assert everything_is_free(played)


@pytest.mark.parametrize("committed", [False, True])
def test_a_peer_that_hangs_costs_blocks_and_no_wait(tiny_llama: str, committed: bool) -> None:
    played = Played(tiny_llama)
    request = played.land("moved", 50)
    (job,) = played.jobs(played.step())
    if committed:
        played.commit(request)
    hung = JobResult(job.job_id, ok=False, error=("deadline", "late"), bad_blocks=job.local_blocks, quiet=False)
    played.step(StepResults([hung]))
    played.check()
    if not committed:
        assert not played.step().num_scheduled_tokens
        played.executor.copied = lambda job, _: JobResult(job.job_id, ok=False, bad_blocks=job.local_blocks)
        played.commit(request)
    assert played.step().num_scheduled_tokens == {request.request_id: 50}
    assert not set(job.local_blocks) & set(played.blocks(request))
    end(played, request)
    assert not everything_is_free(played)
    played.step(StepResults([], [job.job_id]))
    assert everything_is_free(played)


def test_the_second_runner_gets_a_resumed_request_with_all_its_tokens(tiny_llama: str) -> None:
    played = Played(tiny_llama, "AsyncMigrationScheduler", v2=True)
    request = played.land("moved", 50, generated=10)
    played.step(played.done(*played.jobs(played.step())))
    played.commit(request)
    (new,) = played.schedule().scheduled_new_reqs
    assert (new.prompt_token_ids, new.prefill_token_ids) == (list(range(1, 41)), list(range(1, 51)))
    assert new.num_computed_tokens == 49


def test_dynamos_scheduler_with_metrics_migrates_too(tiny_llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("dynamo.vllm.instrumented_scheduler")
    from components.serve.servers import free_port

    monkeypatch.setenv("DYN_FORWARDPASS_METRIC_PORT", str(free_port()))
    played = Played(tiny_llama, "InstrumentedMigrationScheduler")
    request = played.land("moved", 50)
    played.step(played.done(*played.jobs(played.step())))
    played.commit(request)
    assert played.step().num_scheduled_tokens == {request.request_id: 1}
    played.call(Op.FREEZE, request)
    end(played, request)
    assert everything_is_free(played)
    played.scheduler.shutdown()


@pytest.mark.parametrize(
    ("cls", "ahead"), [("MigrationScheduler", 1), ("AsyncMigrationScheduler", 1), ("AsyncMigrationScheduler", 2)]
)
@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_no_block_is_lost_and_none_has_two_writers(
    tiny_llama: str, cls: str, ahead: int, seed: int
) -> None:
    """Random operations, up to ``ahead`` steps under way; ``Played.schedule`` looks at every step, ``check`` at the
    blocks after it.
    """
    chance = random.Random(seed)
    played = Played(
        tiny_llama, cls, blocks=chance.choice([14, 40]), max_num_seqs=4, wait_bytes=chance.choice([0, 1 << 24])
    )
    kept: list[Any] = []
    under_way: list[Any] = []
    jobs: dict[int, Any] = {}
    hung: list[int] = []

    def answer(job: Any, _: float = 0.0) -> JobResult | None:
        if chance.random() < 0.3:
            jobs[job.job_id] = job
            return None
        ok = chance.random() < 0.8
        quiet = ok or chance.random() < 0.5
        if not quiet:
            hung.append(job.job_id)
        bad = () if ok else tuple(chance.sample(job.local_blocks, len(job.local_blocks) // 2))
        return JobResult(job.job_id, ok, bad_blocks=bad, quiet=quiet)

    played.executor.copied = answer

    def operate() -> None:
        what = chance.choice(["add", "land", "freeze", "resume", "status", "extend", "commit", "commit", "end"])
        if what == "add":
            kept.append(played.add([chance.randrange(9) for _ in range(chance.randrange(1, 90))]))
        elif what == "land":
            tokens = chance.randrange(1, 90)
            computed = chance.choice([tokens - 1, tokens // 2, 0])
            kept.append(played.land(f"l{chance.random()}", tokens, min(1, tokens - 1), offer_of("l", computed)))
        elif kept:
            request = chance.choice(kept)
            tokens = tuple(request.output_token_ids)
            if what in ("extend", "commit"):
                tokens += tuple(chance.randrange(9) for _ in range(chance.randrange(20)))
            computed = request.num_prompt_tokens + len(tokens) - 1
            offer = offer_of("l", computed // BLOCK * BLOCK, generation=chance.choice([0, 0, 0, 1]))
            try:
                if what == "end":
                    end(played, request)
                elif what == "freeze":
                    played.call(Op.FREEZE, request)
                elif what == "resume":
                    played.call(Op.RESUME, request)
                elif what == "status":
                    played.call(Op.LANDING, request)
                elif what == "extend":
                    played.call(Op.EXTEND, request, offer=offer, tokens=tokens)
                else:
                    offer = offer_of("l", chance.choice([computed] * 4 + [0]), generation=offer.generation)
                    played.call(Op.COMMIT, request, frozen=Frozen(offer, tokens))
            except (NoRoom, SessionError, RequestNotFound):
                pass

    def finish(output: Any) -> None:
        begun = [result for job in played.jobs(output) if (result := answer(job)) is not None]
        for job_id in [i for i in jobs if chance.random() < 0.4]:
            if (result := answer(jobs.pop(job_id))) is not None:
                begun.append(result)
        quiet = [hung.pop() for _ in range(len(hung)) if chance.random() < 0.4 and not is_new(hung[-1], begun)]
        played.finish_step(output, StepResults(begun, quiet))
        kept[:] = [r for r in kept if played.scheduler.migration.find(r.request_id)]
        played.check()

    def is_new(job_id: int, begun: list[JobResult]) -> bool:
        return any(result.job_id == job_id for result in begun)

    for _ in range(150):
        for _ in range(chance.randrange(4)):
            operate()
        under_way.append(played.schedule())
        if len(under_way) == ahead:
            finish(under_way.pop(0))
    for request in list(kept):
        end(played, request)
    while under_way or jobs or hung:
        finish(under_way.pop(0) if under_way else played.schedule())
    played.step()
    assert everything_is_free(played)
    assert played.scheduler.max_num_active_reqs == 4
