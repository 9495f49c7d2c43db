# SPDX-License-Identifier: Apache-2.0
"""Which decode worker a router gives a new request to."""

from __future__ import annotations

from collections import Counter

import pytest

from components.engine.protocol import EngineInfo, EngineStats
from components.errors import NoRoom
from components.messages import WorkerReply
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


def test_round_robin_leaves_out_workers_that_take_nothing() -> None:
    in_turn = pool(True, {1: 0, 2: 0})
    in_turn.workers[1].held_back = True
    assert {in_turn.pick("decode").instance for _ in range(3)} == {2}
    with pytest.raises(NoRoom):
        in_turn.pick("decode", exclude=(2,))
