# SPDX-License-Identifier: Apache-2.0
"""Real vLLM schedulers, step by step: one lends the blocks of prompts, another takes them."""

from __future__ import annotations

import random
from typing import Any

import pytest

from components.engine.kv import Frozen, RequestId
from components.engine.vllm.control import MARKER, Lent, Marker, Op, decode_lent
from components.engine.vllm.records import JobResult, StepResults, Sums
from tests.vllm_scheduler import BLOCK, Played, offer_of

pytest.importorskip("vllm")


def end(played: Played, request: Any) -> None:
    from vllm.v1.request import RequestStatus

    played.scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)


def everything_is_free(played: Played) -> bool:
    played.check()
    return played.free == played.scheduler.migration.port.num_blocks - 1


def prefill(played: Played, prompt: list[int], **sampling: Any) -> Any:
    name = f"p{len(prompt)}"
    return played.add(prompt, Marker(RequestId(name), lend=True), name, **{"max_tokens": 1} | sampling)


def summed(output: Any) -> StepResults:
    """What the workers say of the blocks that a step completes."""
    wanted = output.kv_connector_metadata.to_sum
    return StepResults(
        [], sums=[Sums.known(vllm_id, 0, tuple(10 * block for block in blocks)) for vllm_id, blocks in wanted]
    )


def lent_of(played: Played, request: Any) -> Lent:
    """Run a prefill to its end."""
    while True:
        output = played.schedule()
        sent_to = played.finish_step(output, summed(output))
        for sent in sent_to[request.client_index].outputs if sent_to else ():
            if sent.request_id == request.request_id and sent.finish_reason is not None:
                return decode_lent(sent.kv_transfer_params[MARKER])


@pytest.mark.parametrize("scheduler", ["MigrationScheduler", "AsyncMigrationScheduler"])
@pytest.mark.parametrize("tokens", [1, BLOCK, 2 * BLOCK + 5, 100])
def test_a_prefill_lends_all_blocks_of_its_prompt(tiny_llama: str, tokens: int, scheduler: str) -> None:
    # A long prompt takes several steps.
    played = Played(tiny_llama, scheduler, max_num_batched_tokens=64)
    request = prefill(played, list(range(tokens)))
    lent = lent_of(played, request)
    blocks = -(-tokens // BLOCK)
    assert lent.frozen.offer.num_tokens == tokens and len(lent.frozen.offer.block_ids) == blocks
    assert lent.frozen.checksums == tuple(10 * block for block in lent.frozen.offer.block_ids[-2:])
    played.step()
    assert played.free == played.scheduler.migration.port.num_blocks - 1 - blocks
    assert not played.scheduler.has_requests(), "lent blocks must not keep the engine stepping"
    played.check()
    played.call(Op.RELEASE, request)
    played.call(Op.RELEASE, request)
    assert everything_is_free(played)


def test_a_prompt_from_the_prefix_cache_is_lent_as_well(tiny_llama: str) -> None:
    played = Played(tiny_llama)
    first = prefill(played, list(range(50)))
    lent_of(played, first)
    second = prefill(played, list(range(50)))
    assert len(lent_of(played, second).frozen.checksums) == 2
    played.call(Op.RELEASE, first)
    played.check()
    played.call(Op.RELEASE, second)
    assert everything_is_free(played)


def test_an_aborted_prefill_lends_nothing(tiny_llama: str) -> None:
    played = Played(tiny_llama, max_num_batched_tokens=64)
    request = prefill(played, list(range(200)))
    played.step()
    end(played, request)
    played.step()
    assert everything_is_free(played)


def take(played: Played, prompt: int, first: bool = True, name: str = "taken") -> Any:
    """A request whose prompt is with a prefill engine; ``first``: its first token comes from there."""
    count = min(2, -(-prompt // BLOCK))
    frozen = Frozen(offer_of(name, prompt), (7,), checksums=(0,) * count, checked=(count,))
    marker = Marker(RequestId(name), num_prompt_tokens=prompt if first else None, handoff=frozen)
    return played.add([*range(1, prompt + 1), *([7] if first else [])], marker, name)


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("scheduler", ["MigrationScheduler", "AsyncMigrationScheduler"])
@pytest.mark.parametrize("prompt", [1, BLOCK, 50])
def test_the_second_token_is_the_first_that_a_decode_engine_computes(
    tiny_llama: str, prompt: int, scheduler: str, v2: bool
) -> None:
    played = Played(tiny_llama, scheduler, v2=v2)
    request = take(played, prompt)
    output = played.schedule()
    (job,) = played.jobs(output)
    assert not output.num_scheduled_tokens and job.remote_blocks == tuple(range(100, 100 + -(-prompt // BLOCK)))
    assert [block for block, _ in job.checks] == list(job.local_blocks[-2:])
    played.finish_step(output, played.done(job))
    assert played.step().num_scheduled_tokens == {request.request_id: 1}
    assert list(request.output_token_ids) == [7, 7] and request.num_prompt_tokens == prompt
    end(played, request)
    played.step()
    assert everything_is_free(played)


def test_without_the_first_token_the_last_token_of_the_prompt_is_computed_again(tiny_llama: str) -> None:
    played = Played(tiny_llama)
    request = take(played, 50, first=False)
    played.step(played.done(*played.jobs(played.schedule())))
    assert played.step().num_scheduled_tokens == {request.request_id: 1}
    assert list(request.output_token_ids) == [7]


def test_only_what_the_own_prefix_cache_has_not_is_copied(tiny_llama: str) -> None:
    played = Played(tiny_llama)
    before = played.add(list(range(1, 41)), max_tokens=1)
    played.step()
    assert before.is_finished()
    request = take(played, 50)
    output = played.schedule()
    (job,) = played.jobs(output)
    assert job.remote_blocks == (102, 103) and job.local_blocks == tuple(played.blocks(request)[2:])
    played.finish_step(output, played.done(job))
    assert played.step().num_scheduled_tokens == {request.request_id: 1}


def test_blocks_that_did_not_arrive_are_computed(tiny_llama: str) -> None:
    played = Played(tiny_llama)
    request = take(played, 50)
    output = played.schedule()
    (job,) = played.jobs(output)
    failed = JobResult(job.job_id, ok=False, error=("integrity", ""), bad_blocks=job.local_blocks[2:])
    played.finish_step(output, StepResults([failed]))
    # Nothing had landed before the only copy of a hand-over: all of it counts as missing.
    assert played.step().num_scheduled_tokens == {request.request_id: 51}
    assert list(request.output_token_ids) == [7, 7]
    end(played, request)
    played.step()
    assert everything_is_free(played)


def test_a_loan_with_other_checksums_than_blocks_is_computed_here(tiny_llama: str) -> None:
    played = Played(tiny_llama)
    frozen = Frozen(offer_of("odd", 50), (7,), checksums=(1, 2), checked=(3,))
    request = played.add([*range(1, 51), 7], Marker(RequestId("odd"), num_prompt_tokens=50, handoff=frozen), "odd")
    assert played.step().num_scheduled_tokens == {request.request_id: 51}
    end(played, request)
    played.step()
    assert everything_is_free(played)


def test_blocks_that_a_silent_peer_may_still_write_are_nobodys(tiny_llama: str) -> None:
    played = Played(tiny_llama)
    request = take(played, 50)
    output = played.schedule()
    (job,) = played.jobs(output)
    late = JobResult(job.job_id, ok=False, error=("deadline", ""), bad_blocks=job.local_blocks, quiet=False)
    played.finish_step(output, StepResults([late]))
    assert played.step().num_scheduled_tokens == {request.request_id: 51}
    assert not set(played.blocks(request)) & set(job.local_blocks)
    end(played, request)
    played.check()
    played.step(StepResults([], quiet=[job.job_id]))
    assert everything_is_free(played)


def test_a_client_that_leaves_during_the_copy_leaves_its_blocks_to_the_copy(tiny_llama: str) -> None:
    played = Played(tiny_llama)
    request = take(played, 50)
    output = played.schedule()
    (job,) = played.jobs(output)
    end(played, request)
    played.finish_step(output)
    played.check()
    assert played.free == played.scheduler.migration.port.num_blocks - 1 - len(job.local_blocks)
    played.step(played.done(job))
    assert everything_is_free(played)


def test_a_request_waits_for_room_and_is_copied_then(tiny_llama: str) -> None:
    played = Played(tiny_llama, blocks=10)
    other = played.add(list(range(1000, 1100)))
    played.step()
    request = take(played, 60)
    assert played.jobs(played.step()) == []
    end(played, other)
    output = played.schedule()
    played.finish_step(output, played.done(*played.jobs(output)))
    assert played.step().num_scheduled_tokens == {request.request_id: 1}


def test_a_preempted_request_computes_its_prompt_itself(tiny_llama: str) -> None:
    played = Played(tiny_llama)
    request = take(played, 50)
    output = played.schedule()
    played.finish_step(output, played.done(*played.jobs(output)))
    played.step()
    played.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert played.jobs(output := played.schedule()) == []
    assert output.num_scheduled_tokens == {request.request_id: 52}
    played.finish_step(output)


def told(sent: Any) -> dict[str, list[float]]:
    """What a step says in the metrics of vLLM's connector."""
    (outputs,) = sent.values()
    given = outputs.scheduler_stats.kv_connector_stats or {}
    return {name: values for name, values in given.items() if values}


def test_prompts_from_elsewhere_are_in_the_metrics_of_stock_and_moves_are_not(tiny_llama: str) -> None:
    played = Played(tiny_llama)
    take(played, 50)
    landing = played.land("moved", 40)
    output = played.schedule()
    copied = [
        JobResult(job.job_id, ok=True, bytes=100, descriptors=4, post_s=0.5, wire_s=1) for job in played.jobs(output)
    ]
    assert len(copied) == 2
    for _ in range(3):
        played.finish_step(output)
        output = played.schedule()
    assert told(played.finish_step(output, StepResults(copied))) == {
        "transfer_duration": [1.5],
        "post_duration": [0.5],
        "bytes_transferred": [100],
        "num_descriptors": [4],
    }
    end(played, landing)
    request = take(played, 60, name="broken")
    output = played.schedule()
    (job,) = played.jobs(output)
    failed = JobResult(job.job_id, ok=False, error=("integrity", ""), bad_blocks=job.local_blocks)
    assert told(played.finish_step(output, StepResults([failed]))) == {"num_failed_transfers": [1]}
    end(played, request)
    lender = prefill(played, list(range(70)))
    lent_of(played, lender)
    played.call(Op.RELEASE, lender, expired=True)
    played.call(Op.RELEASE, lender, expired=True)
    assert told(played.finish_step(played.schedule())) == {"num_kv_expired_reqs": [1]}
    assert told(played.finish_step(played.schedule())) == {}


def test_vllm_finds_the_statistics_beside_those_of_another_connector() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector

    from components.engine.vllm.connector import MigrationConnector

    sent = MigrationConnector.build_kv_connector_stats()
    sent.data["transfer_duration"].append(2.0)
    sent.data["post_duration"].append(1.0)
    sent.data["bytes_transferred"].append(1 << 20)
    sent.data["num_descriptors"].append(3)
    found = MultiConnector.build_kv_connector_stats({"MigrationConnector": sent.to_dict()})
    assert found is not None and found.reduce()["MigrationConnector"]["Avg xfer time (ms)"] == 2000


@pytest.mark.parametrize("seed", range(60))
def test_whatever_happens_every_block_is_accounted_for(tiny_llama: str, seed: int) -> None:
    chance = random.Random(seed)
    scheduler = chance.choice(["MigrationScheduler", "AsyncMigrationScheduler"])
    played = Played(tiny_llama, scheduler, v2=chance.random() < 0.5, blocks=chance.choice([16, 40]))
    live: list[Any] = []
    lent: list[str] = []
    flying: list[Any] = []
    noisy: list[int] = []

    def answer(job: Any) -> JobResult:
        if chance.random() < 0.7:
            return JobResult(job.job_id, ok=True)
        quiet = chance.random() < 0.5
        if not quiet:
            noisy.append(job.job_id)
        bad = job.local_blocks[chance.randrange(len(job.local_blocks)) :]
        return JobResult(job.job_id, ok=False, error=("integrity", ""), bad_blocks=bad, quiet=quiet)

    def step(lively: bool) -> None:
        output = played.schedule()
        flying.extend(played.jobs(output))
        results = summed(output) if chance.random() < 0.9 or not lively else StepResults([])
        for job in [job for job in flying if not lively or chance.random() < 0.5]:
            flying.remove(job)
            results.results.append(answer(job))
        already = [j for j in noisy if j not in {r.job_id for r in results.results}]
        results.quiet.extend(j for j in already if not lively or chance.random() < 0.3)
        noisy[:] = [j for j in noisy if j not in results.quiet]
        for outputs in played.finish_step(output, results).values():
            for sent in outputs.outputs:
                if MARKER in (sent.kv_transfer_params or {}):
                    lent.append(sent.request_id)
        played.check()

    for _ in range(120):
        match chance.choice(["prefill", "take", "plain", "end", "release", "step", "step", "step"]):
            case "prefill" if len(live) < 6:
                live.append(prefill(played, list(range(chance.randint(1, 120)))))
            case "take" if len(live) < 6:
                live.append(take(played, chance.randint(1, 120), first=chance.random() < 0.7))
            case "plain" if len(live) < 6:
                live.append(played.add(list(range(chance.randint(1, 80))), max_tokens=chance.randint(1, 30)))
            case "end" if live:
                end(played, live.pop(chance.randrange(len(live))))
            case "release" if lent:
                played.call(Op.RELEASE, lent.pop(chance.randrange(len(lent))))
            case _:
                step(lively=True)
        live = [request for request in live if not request.is_finished()]
    for request in live:
        end(played, request)
    for _ in range(4):
        step(lively=False)
    for vllm_id in lent:
        played.call(Op.RELEASE, vllm_id)
    assert everything_is_free(played)
