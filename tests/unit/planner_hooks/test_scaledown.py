# SPDX-License-Identifier: Apache-2.0
"""A reduction is held until its victim is empty, on snapshots of scripted clusters."""

from __future__ import annotations

import pytest

from components.errors import ConfigError
from planner_hooks.config import parse
from planner_hooks.headcount import GONE_S
from planner_hooks.plan import HoldReason
from planner_hooks.rules import ScaleDownRules
from planner_hooks.scaledown import ScaleDown
from planner_hooks.snapshot import Snapshot
from tests.unit.planner_hooks.clusters import cluster, request


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def seen(tokens: dict[str, int], leaving: tuple[str, ...] = (), stuck: tuple[str, ...] = ()) -> Snapshot:
    """One request of this size on each worker; 0 means none."""
    rows = [
        request(f"r-{w}", w, size, not_migratable="guided decoding" if w in stuck else None)
        for w, size in tokens.items()
        if size
    ]
    return Snapshot.of(cluster(rows, {w: {"draining": w in leaving} for w in tokens}), 5.0)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def scale_down(clock: Clock) -> ScaleDown:
    return ScaleDown(ScaleDownRules(delay_s=10, reserve=0), (1, 4), 300.0, clock)


def begun(scale_down: ScaleDown, clock: Clock, snapshot: Snapshot) -> tuple[str, ...]:
    """Propose one worker fewer for as long as it takes; the victims."""
    count = len(snapshot.worker_ids)
    assert scale_down.decide(count - 1, count, snapshot).reason is HoldReason.DELAYED
    clock.now += 11
    answer = scale_down.decide(count - 1, count, snapshot)
    assert (answer.at_least, answer.at_most) == (count, count)
    return answer.retire


def test_the_cheapest_worker_goes_once_it_is_empty(scale_down: ScaleDown, clock: Clock) -> None:
    assert begun(scale_down, clock, seen({"a": 2000, "b": 300, "c": 2500})) == ("b",)
    busy = scale_down.decide(2, 3, seen({"a": 2000, "b": 300, "c": 2500}, leaving=("b",)))
    assert (busy.at_most, busy.reason) == (3, HoldReason.DRAINING)
    empty = scale_down.decide(2, 3, seen({"a": 2000, "b": 0, "c": 2800}, leaving=("b",)))
    assert (empty.at_least, empty.at_most, empty.reason) == (2, 2, None)


def test_a_request_that_cannot_move_keeps_its_worker(scale_down: ScaleDown, clock: Clock) -> None:
    assert begun(scale_down, clock, seen({"a": 100, "b": 2000}, stuck=("a",))) == ("b",)


def test_an_operators_drained_worker_goes_first(scale_down: ScaleDown, clock: Clock) -> None:
    assert begun(scale_down, clock, seen({"a": 100, "b": 2000}, leaving=("b",))) == ("b",)


def test_a_begun_reduction_outlives_the_wish_but_not_a_wish_for_more(scale_down: ScaleDown, clock: Clock) -> None:
    begun(scale_down, clock, seen({"a": 2000, "b": 300}))
    snapshot = seen({"a": 2000, "b": 300}, leaving=("b",))
    assert scale_down.decide(2, 2, snapshot).reason is HoldReason.DRAINING
    more = scale_down.decide(3, 2, snapshot)
    assert (more.at_most, more.release) == (4, ("b",))
    assert not scale_down.victims


def test_victims_are_taken_back_when_the_rest_is_full(scale_down: ScaleDown, clock: Clock) -> None:
    begun(scale_down, clock, seen({"a": 2000, "b": 300}))
    answer = scale_down.decide(1, 2, seen({"a": 9000, "b": 300}, leaving=("b",)))
    assert (answer.at_most, answer.release, answer.reason) == (2, ("b",), HoldReason.NO_DESTINATION)


def test_nothing_goes_that_the_rest_could_not_hold(scale_down: ScaleDown, clock: Clock) -> None:
    assert begun(scale_down, clock, seen({"a": 5000, "b": 4000})) == ()


def test_few_workers_keep_a_reserve_that_many_have_anyway(clock: Clock) -> None:
    def victims(workers: str) -> tuple[str, ...]:
        rules = ScaleDownRules(delay_s=10, reserve=0.8)
        return begun(ScaleDown(rules, (1, 9), 300.0, clock), clock, seen(dict.fromkeys(workers, 3000)))

    assert victims("ab") == ()
    assert len(victims("abcdefgh")) == 1


def test_victims_are_taken_back_when_the_reserve_shrinks(clock: Clock) -> None:
    scale_down = ScaleDown(ScaleDownRules(delay_s=10, reserve=0.8), (1, 4), 300.0, clock)
    assert begun(scale_down, clock, seen({"a": 1500, "b": 300})) == ("b",)
    assert scale_down.decide(1, 2, seen({"a": 4000, "b": 300}, leaving=("b",))).release == ()
    assert scale_down.decide(1, 2, seen({"a": 6000, "b": 300}, leaving=("b",))).release == ("b",)


def test_nothing_goes_without_a_current_state(scale_down: ScaleDown) -> None:
    for snapshot in (None, seen({"a": 100})):
        answer = scale_down.decide(1, 2, snapshot)
        assert (answer.at_least, answer.at_most, answer.reason) == (2, 4, HoldReason.STALE)


def test_bounds_hold_whatever_is_proposed(clock: Clock) -> None:
    fixed = ScaleDown(ScaleDownRules(delay_s=0), None, 300.0, clock)
    for proposed in (0, 1, 2, 9):
        answer = fixed.decide(proposed, 2, seen({"a": 0, "b": 0}))
        assert (answer.at_least, answer.at_most, answer.retire) == (2, 2, ())


def test_a_worker_that_cannot_be_emptied_goes_after_the_time_out(scale_down: ScaleDown, clock: Clock) -> None:
    begun(scale_down, clock, seen({"a": 2000, "b": 300}))
    clock.now += 301
    assert scale_down.decide(1, 2, seen({"a": 2000, "b": 300}, leaving=("b",))).at_most == 1


def test_contradictory_limits_are_refused() -> None:
    with pytest.raises(ConfigError, match="give-up-usage"):
        parse({"scale-down": {"max-usage": 0.9, "give-up-usage": 0.5}})
    with pytest.raises(ConfigError, match="delay-s"):
        parse({"scale-down": {"delays": 3}})


def test_workers_that_are_starting_count_as_there(clock: Clock) -> None:
    starting = ScaleDown(ScaleDownRules(delay_s=10), (1, 4), 300.0, clock, started=2)
    # One of two is ready, and the planner knows of no other.
    for proposed, ready in ((0, 0), (1, 1)):
        answer = starting.decide(proposed, ready, seen(dict.fromkeys("a"[:ready], 0)))
        assert (answer.at_least, answer.at_most) == (2, 4)
    assert starting.decide(1, 1, seen({"a": 0})).reason is HoldReason.MISSING
    clock.now += 11
    assert starting.decide(1, 2, seen({"a": 0, "b": 0})).reason is HoldReason.DELAYED


def test_a_crashed_worker_counts_as_there_but_not_for_ever(scale_down: ScaleDown, clock: Clock) -> None:
    scale_down.decide(3, 3, seen({"a": 100, "b": 100, "c": 100}))
    assert scale_down.decide(2, 2, seen({"a": 100, "b": 100})).at_least == 3
    assert scale_down.decide(3, 2, seen({"a": 100, "b": 100})).at_least == 3
    clock.now += GONE_S + 1
    assert scale_down.decide(2, 2, seen({"a": 100, "b": 100})).at_least == 2


def test_what_was_let_through_is_not_asked_back(scale_down: ScaleDown, clock: Clock) -> None:
    begun(scale_down, clock, seen({"a": 2000, "b": 300}))
    empty = seen({"a": 2300, "b": 0}, leaving=("b",))
    assert scale_down.decide(1, 2, empty).at_most == 1
    # The number is being carried out: routers and discovery lose the worker one after the other.
    scale_down.decide(2, 2, seen({"a": 2300}), scaling=True)
    gone = scale_down.decide(1, 1, seen({"a": 2300}))
    assert (gone.at_least, gone.reason) == (1, None)


def test_victims_are_taken_back_when_another_worker_crashes_and_the_rest_is_full(
    scale_down: ScaleDown, clock: Clock
) -> None:
    begun(scale_down, clock, seen({"a": 3000, "b": 300, "c": 2000}))
    answer = scale_down.decide(1, 2, seen({"a": 9000, "b": 300}, leaving=("b",)))
    assert (answer.at_least, answer.release) == (3, ("b",))
