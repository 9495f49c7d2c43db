# SPDX-License-Identifier: Apache-2.0
"""Which decode worker a router gives a new request to."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from components.engine.protocol import EngineInfo, EngineStats
from components.errors import NoRoom, WorkerLost
from components.messages import WorkerOp, WorkerReply
from components.router.workers import Worker, WorkerPool


def pool(round_robin: bool, used: dict[int, int]) -> WorkerPool:
    """A pool of decode workers with so many of 100 blocks in use."""
    found = WorkerPool(None, "test", lambda worker: None, round_robin)
    for instance, blocks in used.items():
        worker = Worker(instance, "decode", None, None)
        info = EngineInfo("m", "f", 16, 100, 4096, 16, 2048, agents=())
        stats = EngineStats(0, 0, 0, 0, free_blocks=100 - blocks, total_blocks=100)
        worker.state = WorkerReply(info=info, stats=stats)
        found.workers[instance] = worker
    return found


def test_least_loaded_and_round_robin() -> None:
    used = {1: 60, 2: 10, 3: 50}
    assert {pool(False, used).pick("decode").instance for _ in range(4)} == {2}
    in_turn = pool(True, used)
    assert Counter(in_turn.pick("decode").instance for _ in range(6)) == {1: 2, 2: 2, 3: 2}


def report(running: int, waiting: int = 0) -> WorkerReply:
    """What a worker with no block in use says."""
    info = EngineInfo("m", "f", 16, 100, 4096, 16, 2048, agents=())
    return WorkerReply(info=info, stats=EngineStats(running, waiting, 0, 0, free_blocks=100, total_blocks=100))


def test_requests_that_ended_since_the_report_are_no_load() -> None:
    workers = pool(False, {1: 0, 2: 0}).workers
    for worker in workers.values():
        worker.streams = 2
        worker.report(report(running=2), asked_with=2)
    workers[1].streams = 1
    assert workers[1].load() < workers[2].load()
    # It was asked before the end of the request and answers after it: still the same two requests.
    workers[1].report(report(running=2), asked_with=2)
    assert workers[1].load() < workers[2].load()


def test_requests_of_other_routers_are_load() -> None:
    workers = pool(False, {1: 0, 2: 0}).workers
    workers[1].streams = workers[2].streams = 2
    workers[1].report(report(running=4, waiting=1), asked_with=2)
    workers[2].report(report(running=2), asked_with=2)
    assert workers[1].others == 3
    assert workers[1].load() > workers[2].load()


def test_among_equals_the_one_that_computes_no_prompt() -> None:
    found = pool(False, {1: 0, 2: 0})
    for worker in found.workers.values():
        worker.streams = 2
    found.workers[1].prompt_tokens = 500
    assert found.pick("decode").instance == 2


def test_two_prompts_are_not_computed_one_after_the_other_for_the_sake_of_one_seat() -> None:
    found = pool(False, {1: 0, 2: 0})
    one, two = found.workers.values()
    one.streams, one.prompts, one.prompt_tokens, two.streams = 1, 1, 96, 2
    assert found.pick("decode").instance == 2
    two.streams = 3
    assert found.pick("decode").instance == 1


def test_round_robin_leaves_out_workers_that_take_nothing() -> None:
    in_turn = pool(True, {1: 0, 2: 0})
    in_turn.workers[1].held_back = True
    assert {in_turn.pick("decode").instance for _ in range(3)} == {2}
    with pytest.raises(NoRoom):
        in_turn.pick("decode", exclude=(2,))


def test_a_worker_that_cannot_be_reached_is_the_last_choice() -> None:
    for round_robin in (False, True):
        found = pool(round_robin, {1: 0, 2: 90})
        found.workers[1].lost = True
        assert {found.pick("decode").instance for _ in range(3)} == {2}
        # It may be a passing failure: better tried than refused.
        assert found.pick("decode", exclude=(2,)).instance == 1
        # A drain does not.
        with pytest.raises(NoRoom, match="can be reached"):
            found.pick("decode", exclude=(2,), reachable=True)
        found.workers[1].report(report(running=0), asked_with=0)
        assert 1 in {found.pick("decode").instance for _ in range(2)}


class Dead:
    """A client of an endpoint whose process is gone."""

    async def direct(self, *_: object, **__: object) -> None:
        raise ConnectionRefusedError("nobody listens")


def test_a_refused_call_marks_the_worker_until_its_next_report() -> None:
    worker = Worker(1, "decode", Dead(), Dead())
    with pytest.raises(WorkerLost, match="nobody listens"):
        asyncio.run(worker.call(WorkerOp.INFO))
    assert worker.lost
    worker.report(report(running=0), asked_with=0)
    assert not worker.lost
