# SPDX-License-Identifier: Apache-2.0
"""Disaggregated prefill: loans of a prefill engine, their way into a decode engine, the choice of the first token."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from vllm import SamplingParams
from vllm.v1.request import RequestStatus

from components.engine.groups import Table
from components.engine.kv import Frozen, KVOffer, RequestId
from components.engine.vllm.compat.connectors import Neighbours
from components.engine.vllm.control import MARKER, Marker, decode_lent
from components.engine.vllm.direct import Inbox
from components.engine.vllm.handoff import Handoff
from components.engine.vllm.migrate_in import MigrateIn
from components.engine.vllm.migrate_out import MigrateOut
from components.engine.vllm.records import JobResult, Record, StepResults, Sums
from components.transfer.ids import AgentName, AgentRef, Epoch

AGENT = AgentRef(AgentName("prefill"), Epoch("1"))
BLOCK = 4


class Group:
    """One group of layers that keeps everything."""

    block_size = BLOCK
    windowed = state = check_all = False

    def blocks_of(self, num_tokens: int) -> int:
        return -(-num_tokens // BLOCK)

    def first_needed(self, num_tokens: int) -> int:
        return 0


@dataclass
class Port:
    """A double of ``SchedulerPort`` for hand-offs, with its calls in order."""

    ids: list[int]
    told: list[tuple[Any, ...]] = field(default_factory=list)
    block_size: int = BLOCK
    not_movable: str | None = None
    neighbours: Neighbours = field(default_factory=lambda: Neighbours(None))

    @property
    def groups(self) -> list[Group]:
        return [Group()]

    def held(self, request: Any, num_tokens: int) -> list[Table]:
        return [Table(BLOCK, 0, tuple(self.ids[: -(-num_tokens // BLOCK)]))]

    def take_blocks(self, request: Any) -> list[str]:
        return [f"block {number}" for number in self.ids]

    def free_blocks_of(self, blocks: list[str]) -> None:
        self.told.append(("free", *blocks))

    def finish_recv(self, request: Any, num_tokens: int) -> None:
        self.told.append(("arrived", num_tokens))

    def fail_recv(self, request: Any, num_tokens: int) -> None:
        self.told.append(("recompute from", num_tokens))

    @property
    def seats(self) -> Any:
        return SimpleNamespace(give_up=lambda request: None)


def request_of(prompt: int = 10, outputs: tuple[int, ...] = (7,), **params: Any) -> Any:
    return SimpleNamespace(
        request_id="r-12345678",
        num_prompt_tokens=prompt,
        num_computed_tokens=0,
        num_preemptions=0,
        num_tokens=prompt + len(outputs),
        output_token_ids=list(outputs),
        status=RequestStatus.FINISHED_LENGTH_CAPPED,
        sampling_params=SamplingParams(**params),
    )


def engine(ids: list[int], checked: int | None = 2) -> tuple[Handoff, MigrateIn, Port]:
    port = Port(ids)
    outgoing = MigrateOut(port, checked, lambda: None)  # type: ignore[arg-type, return-value]
    outgoing.agents = (AGENT,)
    incoming = MigrateIn(port, 1 << 20, 30.0, lambda: None, Inbox("127.0.0.1"))  # type: ignore[arg-type, return-value]
    incoming.cache.num_ranks = 1
    return Handoff(port, incoming, outgoing), incoming, port  # type: ignore[arg-type]


def lent(handoff: Handoff, request: Any, sums: tuple[int, ...] = (11, 12)) -> dict[str, Any] | None:
    record = Record(request, Marker(RequestId("r"), lend=True), born=0.0)
    handoff.begin(record)
    step = SimpleNamespace(num_scheduled_tokens={request.request_id: request.num_prompt_tokens})
    assert handoff.to_sum(step) == [("r-12345678", (5, 6))]  # type: ignore[arg-type]
    if sums:
        handoff.summed(StepResults([], sums=[Sums.known("r-12345678", 0, sums)]))
    return handoff.lend(record)


def test_a_prefill_engine_lends_its_blocks_until_they_are_given_back() -> None:
    handoff, _, port = engine([4, 5, 6])
    given = lent(handoff, request_of())
    assert given is not None and given["do_remote_prefill"] is True
    told = decode_lent(given[MARKER])
    assert told.frozen.offer.block_ids == (4, 5, 6) and told.frozen.offer.num_tokens == 10
    assert told.frozen.output_token_ids == (7,) and told.frozen.checksums == (11, 12) and not told.stops
    assert list(handoff.lent_blocks()) == ["block 4", "block 5", "block 6"]
    assert handoff.release("r-12345678") and not handoff.release("r-12345678")
    assert port.told == [("free", "block 4", "block 5", "block 6")]
    assert list(handoff.lent_blocks()) == []


@pytest.mark.parametrize("why", ["aborted", "not summed"])
def test_what_is_not_whole_is_not_lent(why: str) -> None:
    handoff, _, _ = engine([4, 5, 6])
    request = request_of()
    if why == "aborted":
        request.status = RequestStatus.FINISHED_ABORTED
    given = lent(handoff, request, () if why == "not summed" else (11, 12))
    assert given == {"do_remote_prefill": False, "do_remote_decode": False}
    assert list(handoff.lent_blocks()) == []


def test_a_first_token_that_ends_answers_is_named_even_where_it_may_not_end_this_one() -> None:
    handoff, _, _ = engine([4, 5, 6])
    request = request_of(outputs=(2,), ignore_eos=True)
    request.sampling_params.update_from_generation_config({}, eos_token_id=2)
    given = lent(handoff, request)
    assert given is not None and decode_lent(given[MARKER]).stops


def test_an_ordinary_request_is_not_lent() -> None:
    handoff, _, _ = engine([4])
    record = Record(request_of(), Marker(RequestId("r")), born=0.0)
    handoff.begin(record)
    assert handoff.lend(record) is None


def frozen_of(prompt: int = 10, first: tuple[int, ...] = (7,)) -> Frozen:
    blocks = tuple(range(50, 50 - (-prompt // BLOCK)))
    offer = KVOffer(RequestId("p-1"), (AGENT,), BLOCK, blocks, prompt, 0)
    return Frozen(offer, first, checksums=(11, 12), checked=(2,))


def taken(local: int, ids: list[int]) -> tuple[MigrateIn, Port, Record]:
    handoff, incoming, port = engine(ids)
    record = Record(request_of(), Marker(RequestId("r"), handoff=frozen_of()), born=0.0)
    handoff.begin(record)
    assert handoff.external_tokens(record, local) == (10 - local, True)
    handoff.allocated(record, [ids], 10 - local)
    assert handoff.external_tokens(record, 0) == (0, False), "a request that starts over computes by itself"
    return incoming, port, record


def test_a_decode_engine_copies_what_its_own_cache_has_not_and_runs_once_it_is_proven() -> None:
    incoming, port, record = taken(4, [1, 2, 3])
    ((job,), _) = incoming.copies.take_new_jobs()
    assert (job.remote_blocks, job.local_blocks) == ((51, 52), (2, 3))
    assert job.checks == ((2, ((11,),)), (3, ((12,),)))
    incoming.copies.take_results(StepResults([JobResult(job.job_id, ok=True, bytes=2)]))
    assert port.told == [("arrived", 10)] and not incoming.copies.busy and record.incoming is None


def test_each_rank_of_a_source_has_a_checksum_of_each_of_its_heads() -> None:
    handoff, incoming, _ = engine([1, 2, 3])
    frozen = frozen_of()
    frozen = msgspec.structs.replace(
        frozen,
        offer=msgspec.structs.replace(frozen.offer, agents=(AGENT, AGENT)),
        checksums=(11, 12, 21, 22, 31, 32, 41, 42),
    )
    for divides in (False, True):
        incoming.cache.divides = divides
        record = Record(request_of(), Marker(RequestId("r"), handoff=frozen), born=0.0)
        handoff.begin(record)
        assert handoff.external_tokens(record, 4) == ((6, True) if divides else (0, False))
    handoff.allocated(record, [[1, 2, 3]], 6)
    ((job,), _) = incoming.copies.take_new_jobs()
    assert job.checks == ((2, ((11, 12), (31, 32))), (3, ((21, 22), (41, 42))))
    # The results of this engine's one rank end the job, however many the source has.
    incoming.copies.take_results(StepResults([JobResult(job.job_id, ok=True, bytes=2)]))
    assert not incoming.copies.busy


@pytest.mark.parametrize("wrong", [{"checked": ()}, {"checked": (1, 1)}, {"checked": (0,)}, {"checksums": (1, 2, 3)}])
def test_checksums_that_do_not_fit_the_blocks_are_not_taken(wrong: dict[str, tuple[int, ...]]) -> None:
    handoff, _, _ = engine([1, 2, 3])
    record = Record(request_of(), Marker(RequestId("r"), handoff=msgspec.structs.replace(frozen_of(), **wrong)), 0.0)
    handoff.begin(record)
    assert record.handoff is None


def test_blocks_that_are_not_proven_are_computed_again() -> None:
    incoming, port, _ = taken(4, [1, 2, 3])
    ((job,), _) = incoming.copies.take_new_jobs()
    failed = JobResult(job.job_id, ok=False, error=("integrity", "differ"), bad_blocks=(2, 3))
    incoming.copies.take_results(StepResults([failed]))
    assert port.told == [("recompute from", 4)] and incoming.copies.refused == {"integrity": 1}


def test_nothing_is_copied_where_the_own_cache_has_all_or_the_prompt_is_another() -> None:
    handoff, incoming, _ = engine([1, 2, 3])
    record = Record(request_of(), Marker(RequestId("r"), handoff=frozen_of()), born=0.0)
    handoff.begin(record)
    assert handoff.external_tokens(record, 10) == (0, False)
    handoff.allocated(record, [[1, 2, 3]], 0)
    assert incoming.copies.take_new_jobs() == ([], [])
    other = Record(request_of(prompt=11), Marker(RequestId("r"), handoff=frozen_of()), born=0.0)
    handoff.begin(other)
    assert handoff.external_tokens(other, 0) == (0, False)


def test_sums_that_another_process_gets_are_numbers() -> None:
    asked = 0

    def begun() -> tuple[int, ...]:
        nonlocal asked
        asked += 1
        return (11, 12)

    sums = Sums("r", 1, begun)
    there = pickle.loads(pickle.dumps(StepResults([], sums=[sums]))).sums[0]
    assert asked == 1 and (there.vllm_id, there.rank, there.begun()) == ("r", 1, (11, 12))
