# SPDX-License-Identifier: Apache-2.0
"""The simulator's parameters from a run: steps reconstructed from the tokens of all requests."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.policy.calibrate import fit, steps, transfer
from benchmarks.policy.live import Answer, Live, Output, Shape, changed
from components.errors import ConfigError
from components.migration.messages import Mode, MoveRecord
from planner_hooks.simulate.model import WorkerModel

STEP_S, PER_SEQ_S = 0.01, 0.002


def answers(count: int = 40, tokens: int = 100) -> list[Answer]:
    """A worker whose steps take 10 ms and 2 ms for each request; every 0.5 s a request comes and joins at once."""
    clock, alive, begun, times = 0.0, {}, 0, {}
    while begun < count or alive:
        if begun < count and clock >= 0.5 * begun:
            alive[begun], times[begun], begun = tokens, [], begun + 1
        clock += STEP_S + PER_SEQ_S * len(alive)
        for i in list(alive):
            times[i].append(clock)
            alive[i] -= 1
            if not alive[i]:
                del alive[i]
    return [
        Answer(True, 0.5 * i, 10, times[i][0] - 0.5 * i, tuple(np.diff(times[i]).tolist()), "x") for i in range(count)
    ]


def output(found: list[Answer], prefill_worker: bool = False) -> Output:
    live = Live("without", [found], {"a": 0, "b": 0}, [])
    return Output({}, "m", "paged", prefill_worker, Shape(len(found), 0.5, 100, 100, 1, 64), [live], 0)


def test_steps_know_their_batch_and_the_fit_finds_its_cost() -> None:
    rows = steps(answers())
    assert {batch for batch, *_ in rows} <= set(range(1, 6))
    assert all(seconds == pytest.approx(STEP_S + PER_SEQ_S * batch) for batch, _, _, seconds in rows)
    # Every other request belongs to the other worker, so that two workers are given: the same one twice.
    both = [answer for answer in answers() for _ in range(2)]
    found = fit(output(both))
    assert found.step_error < 0.02
    assert found.model.step.base_s + 2 * found.model.step.per_seq_s == pytest.approx(STEP_S + 2 * PER_SEQ_S, rel=0.1)
    tpot = next(c for c in found.compared if c.figure == "TPOT p50 ms")
    assert tpot.simulated == pytest.approx(tpot.measured, rel=0.2)


def test_transfer_cost_is_that_of_the_moves_that_copied() -> None:
    def move(size: int, total_s: float, ok: bool = True) -> MoveRecord:
        return MoveRecord("r", "a", "b", Mode.LIVE, ok, tokens=100, bytes=size, total_s=total_s, downtime_s=0.05)

    model = transfer([move(1000, 0.1), move(3000, 0.3), move(9000, 9.0, ok=False), move(0, 0.01)], WorkerModel())
    assert model.overhead_s == 0.1
    assert model.bytes_per_s == pytest.approx(4000 / 0.2)
    assert model.downtime_s == 0.05
    assert model.kv_bytes_per_token == 20
    assert transfer([], WorkerModel()) == WorkerModel()


def test_runs_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(ConfigError, match="--prefill"):
        fit(output(answers(), prefill_worker=True))
    with pytest.raises(ConfigError, match="too few"):
        fit(output(answers(2, 10)))


def test_a_changed_text_and_an_error_are_counted() -> None:
    one, other = answers(3, 5), answers(3, 5)
    other[1] = Answer(True, 0.5, 10, 0.1, (), "y")
    other[2] = Answer(True, 1.0, 10, 0.1, (), "x", error="lost")
    assert changed([Live("without", [one], {}, []), Live("plugin", [other], {}, [])]) == 2
