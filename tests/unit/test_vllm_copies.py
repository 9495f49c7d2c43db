# SPDX-License-Identifier: Apache-2.0
"""Worker side of the connector: copies that end, take long, fail, or may still be written to by a hanging peer."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from components.engine.kv import RequestId
from components.engine.vllm.records import Install, Job, StepMetadata
from components.errors import DeadlineExceeded, TransferUnavailable
from components.transfer import TransferHandle, TransferResult
from components.transfer.ids import AgentName, AgentRef, Epoch

pytest.importorskip("vllm")
from components.engine.vllm.loader import Loader  # noqa: E402

PEER = AgentRef(AgentName("peer"), Epoch("1"))


class Agent:
    """A transfer agent whose copies the test ends."""

    def __init__(self) -> None:
        self.handles: list[TransferHandle] = []
        self.unsafe: frozenset[int] = frozenset()
        self.refuses = False
        self.arrives = False
        self.sums: dict[int, int] = {}
        self.asked: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self.checked: list[list[int]] = []

    def fetch(self, _: Any, src: Sequence[int], dst: Sequence[int], **__: Any) -> TransferHandle:
        self.asked.append((tuple(src), tuple(dst)))
        if self.refuses:
            raise TransferUnavailable("no lane")
        handle = TransferHandle()
        self.handles.append(handle)
        if self.arrives:
            handle.settle(TransferResult(bytes=7), None)
        return handle

    def unsafe_blocks(self) -> frozenset[int]:
        return self.unsafe

    checksum_units = 1
    record = SimpleNamespace(block_bytes=1 << 27)

    def sources(self, size: int) -> tuple[int, ...]:
        return tuple(range(size))

    def expected(self, sums: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
        return sums[0]

    def checksums(self, blocks: list[int]) -> tuple[int, ...]:
        self.checked.append(blocks)
        return tuple(self.sums.get(block, 0) for block in blocks)


@pytest.fixture
def agent() -> Agent:
    return Agent()


@pytest.fixture
def loader(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> Loader:
    transfer = SimpleNamespace(kv_connector_extra_config={})
    loader = Loader(SimpleNamespace(kv_transfer_config=transfer), None)
    loader._agent = agent  # type: ignore[assignment]
    monkeypatch.setattr(Loader, "rank", 0)
    return loader


def job(number: int = 1, **more: Any) -> Job:
    fields: dict[str, Any] = {
        "remote_blocks": (8, 9),
        "local_blocks": (1, 2),
        "checks": (),
        "vouched": (),
        "deadline_s": 9.0,
    }
    return Job(number, RequestId("r"), **{"agents": (PEER,)} | fields | more)


def test_a_copy_within_its_budget_is_answered_at_once(loader: Loader, agent: Agent) -> None:
    agent.arrives = True
    result = loader.copy_now([job()], 0.0)[0]
    assert result is not None and result.ok and result.bytes == 7
    assert loader.take_results() is None


def test_a_copy_that_takes_longer_is_answered_with_a_step(loader: Loader, agent: Agent) -> None:
    assert loader.copy_now([job()], 0.0)[0] is None
    loader.step([])
    assert loader.take_results() is None
    agent.handles[0].settle(TransferResult(bytes=7), None)
    loader.step([])
    results = loader.take_results()
    assert results is not None and [r.ok for r in results.results] == [True]


def test_nothing_to_copy_is_only_compared(loader: Loader, agent: Agent) -> None:
    agent.sums = {5: 77}
    right = loader.copy_now([job(remote_blocks=(), local_blocks=(), checks=((5, ((77,),)),))], 0.0)[0]
    wrong = loader.copy_now([job(remote_blocks=(), local_blocks=(), checks=((5, ((78,),)),), vouched=(4,))], 0.0)[0]
    assert right is not None and right.ok and not agent.handles
    assert wrong is not None and wrong.error is not None and wrong.error[0] == "integrity"
    assert set(wrong.bad_blocks) == {4, 5}


def test_a_copy_that_cannot_begin_is_a_result(loader: Loader, agent: Agent) -> None:
    agent.refuses = True
    result = loader.copy_now([job()], 0.0)[0]
    assert result is not None and result.error == ("transfer_unavailable", "no lane") and result.bad_blocks == (1, 2)
    loader.step([job(2)])
    results = loader.take_results()
    assert results is not None and [r.job_id for r in results.results] == [2]


def test_a_copy_from_two_ranks_ends_with_both(loader: Loader, agent: Agent) -> None:
    assert loader.copy_now([job(agents=(PEER, PEER))], 0.0)[0] is None
    agent.handles[0].settle(TransferResult(bytes=7, wire_s=1.0), None)
    loader.step([])
    assert loader.take_results() is None
    agent.handles[1].settle(TransferResult(bytes=5, wire_s=2.0), None)
    loader.step([])
    results = loader.take_results()
    assert results is not None and [(r.ok, r.bytes, r.wire_s) for r in results.results] == [(True, 12, 2.0)]


def test_a_copy_from_two_ranks_fails_with_one(loader: Loader, agent: Agent) -> None:
    assert loader.copy_now([job(agents=(PEER, PEER))], 0.0)[0] is None
    agent.handles[0].settle(None, DeadlineExceeded("late"))
    agent.handles[1].settle(TransferResult(bytes=5), None)
    loader.step([])
    results = loader.take_results()
    assert results is not None and results.results[0].error == ("deadline", "late")
    assert results.results[0].bad_blocks == (1, 2)


def test_copies_together_are_begun_before_any_is_waited_for(loader: Loader, agent: Agent) -> None:
    other = AgentRef(AgentName("other"), Epoch("2"))
    jobs = [job(1), job(2, remote_blocks=(), local_blocks=()), job(3, agents=(other,))]
    results = loader.copy_now(jobs, 0.0)
    assert len(agent.handles) == 2
    assert [result is not None and result.ok for result in results] == [False, True, False]
    for handle in agent.handles:
        handle.settle(TransferResult(bytes=7), None)
    loader.step([])
    late = loader.take_results()
    assert late is not None and [(r.job_id, r.ok) for r in late.results] == [(1, True), (3, True)]


def test_copies_together_from_one_source_are_one_copy_with_one_check(loader: Loader, agent: Agent) -> None:
    agent.arrives, agent.sums = True, {1: 5, 3: 6, 5: 8}
    jobs = [
        job(1, checks=((1, ((5,),)),)),
        job(2, remote_blocks=(12, 13, 14, 15), local_blocks=(3, 4, 5, 6), checks=((3, ((6,),)), (5, ((7,),)))),
    ]
    good, bad = loader.copy_now(jobs, 1.0)
    assert agent.asked == [((8, 9, 12, 13, 14, 15), (1, 2, 3, 4, 5, 6))] and agent.checked == [[1, 3, 5]]
    assert good is not None and good.ok and good.bytes == 2
    assert bad is not None and not bad.ok and bad.bad_blocks == (5,)


def test_jobs_of_a_step_from_one_source_are_one_copy_up_to_a_gibibyte(loader: Loader, agent: Agent) -> None:
    other = AgentRef(AgentName("other"), Epoch("2"))
    agent.record = SimpleNamespace(block_bytes=1 << 28)
    jobs = [job(1), job(2, agents=(other,)), job(3, remote_blocks=(5,), local_blocks=(3,)), job(4), job(5)]
    loader.step([*jobs, job(6, deadline_s=2.0)])
    asked = [(8, 9), (8, 9), (8, 9, 5), (8, 9, 8, 9)]
    assert sorted(remote for remote, _ in agent.asked) == asked
    for handle in agent.handles:
        handle.settle(TransferResult(bytes=12), None)
    loader.step([])
    results = loader.take_results()
    assert results is not None and {r.job_id: r.bytes for r in results.results} == {
        1: 8,
        2: 12,
        3: 4,
        4: 6,
        5: 6,
        6: 12,
    }


def test_a_copy_of_two_is_cancelled_when_neither_needs_it(loader: Loader, agent: Agent) -> None:
    assert loader.copy_now([job(1), job(2, remote_blocks=(12,), local_blocks=(3,))], 0.0) == [None, None]
    loader.step([], [1, 1])
    assert not agent.handles[0].cancelled
    loader.step([], [2])
    assert agent.handles[0].cancelled
    agent.unsafe = frozenset({1, 3})
    agent.handles[0].unsafe_blocks = (3,)
    agent.handles[0].settle(None, DeadlineExceeded("late"))
    loader.step([])
    results = loader.take_results()
    assert results is not None and [(r.bad_blocks, r.quiet) for r in results.results] == [((1, 2), True), ((3,), False)]


def test_a_copy_that_nobody_needs_is_cancelled(loader: Loader, agent: Agent) -> None:
    loader.step([job()])
    loader.step([], [1, 99])
    assert agent.handles[0].cancelled


def test_blocks_of_a_hanging_peer_are_named_when_they_are_quiet(loader: Loader, agent: Agent) -> None:
    assert loader.copy_now([job()], 0.0)[0] is None
    (handle,) = agent.handles
    agent.unsafe = handle_blocks = frozenset({1, 2})
    handle.unsafe_blocks = tuple(handle_blocks)
    handle.settle(None, DeadlineExceeded("late"))
    loader.step([])
    results = loader.take_results()
    assert results is not None and not results.results[0].quiet and not results.quiet
    loader.step([])
    assert loader.take_results() is None
    agent.unsafe = frozenset({2, 3})
    loader.step([])
    assert loader.take_results() is None
    agent.unsafe = frozenset({3})
    loader.step([])
    results = loader.take_results()
    assert results is not None and (results.results, results.quiet) == ([], [1])


def test_a_crash_dump_shows_no_tokens() -> None:
    install = Install("r-1", [4711, 4712], [4713], None, None, b"")
    assert "471" not in repr(StepMetadata(installs=[install])) and "2 + 1 tokens" in repr(install)
