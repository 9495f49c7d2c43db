# SPDX-License-Identifier: Apache-2.0
"""Conditions for one worker fewer, on snapshots of scripted clusters."""

from __future__ import annotations

import pytest

from components.errors import ConfigError
from planner_hooks.config import parse
from planner_hooks.headcount import GONE_S
from planner_hooks.plan import HoldReason
from planner_hooks.rules import ScaleDownRules
from planner_hooks.scaledown import Bound, ScaleDown
from planner_hooks.snapshot import Snapshot
from tests.unit.planner_hooks.clusters import cluster, request


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def seen(tokens: dict[str, int], leaving: str = "", stale: str = "") -> Snapshot:
    """One request of this size on each worker, of which each has room for 10,000 tokens; 0 means none."""
    rows = [request(f"r-{w}", w, size) for w, size in tokens.items() if size]
    ages = {w: {"draining": w in leaving, "report_age_s": 60.0 * (w in stale)} for w in tokens}
    return Snapshot.of(cluster(rows, ages), 5.0)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def scale_down(clock: Clock) -> ScaleDown:
    return ScaleDown(ScaleDownRules(delay_s=10, reserve=0), (1, 9), clock)


def waited(scale_down: ScaleDown, clock: Clock, snapshot: Snapshot, ready: int = 0) -> Bound:
    """The answer to a reduction by one worker after its delay."""
    count = ready or len(snapshot.worker_ids)
    assert scale_down.decide(count - 1, count, snapshot).reason is HoldReason.DELAYED
    clock.now += 11
    return scale_down.decide(count - 1, count, snapshot)


def test_a_wish_that_has_lasted_goes_through_at_once(scale_down: ScaleDown, clock: Clock) -> None:
    assert waited(scale_down, clock, seen({"a": 2000, "b": 300, "c": 2500})) == Bound(2, 2)


def test_a_wish_that_is_interrupted_begins_again(scale_down: ScaleDown, clock: Clock) -> None:
    snapshot = seen({"a": 2000, "b": 300})
    for proposed in (1, 2, 1, 3, 1):
        assert scale_down.decide(proposed, 2, snapshot).at_least == 2
        clock.now += 6
    assert scale_down.decide(1, 2, snapshot).reason is HoldReason.DELAYED


def test_workers_go_one_at_a_time(scale_down: ScaleDown, clock: Clock) -> None:
    four = seen(dict.fromkeys("abcd", 100))
    scale_down.decide(1, 4, four)
    clock.now += 11
    assert scale_down.decide(1, 4, four) == Bound(3, 3)
    # The number is being carried out: the worker leaves discovery, is drained, and ends.
    for ready, snapshot in ((4, four), (3, seen(dict.fromkeys("abcd", 100), leaving="a"))):
        clock.now += 11
        assert scale_down.decide(1, ready, snapshot, scaling=True) == Bound(ready, 9, HoldReason.SCALING)
    three = seen(dict.fromkeys("bcd", 100))
    assert scale_down.decide(1, 3, three).reason is HoldReason.DELAYED
    clock.now += 11
    assert scale_down.decide(1, 3, three) == Bound(2, 2)


def test_growth_that_is_being_carried_out_is_not_taken_back(scale_down: ScaleDown, clock: Clock) -> None:
    one, two = seen({"a": 9000}), seen({"a": 9000, "b": 0})
    assert scale_down.decide(2, 1, one) == Bound(1, 9)
    assert scale_down.decide(1, 1, one, scaling=True) == Bound(1, 9)
    assert scale_down.decide(1, 2, two, scaling=True).at_least == 2


def test_nothing_goes_that_the_rest_could_not_hold(scale_down: ScaleDown, clock: Clock) -> None:
    full = seen({"a": 5000, "b": 4000})
    assert waited(scale_down, clock, full).reason is HoldReason.NO_DESTINATION
    # The room must have been there for as long as the wish.
    assert scale_down.decide(1, 2, seen({"a": 500, "b": 400})).reason is HoldReason.DELAYED


def test_few_workers_keep_a_reserve_that_many_have_anyway(clock: Clock) -> None:
    def answer(workers: str) -> Bound:
        rules = ScaleDownRules(delay_s=10, reserve=0.8)
        return waited(ScaleDown(rules, (1, 9), clock), clock, seen(dict.fromkeys(workers, 3000)))

    assert answer("ab").reason is HoldReason.NO_DESTINATION
    assert answer("abcdefgh") == Bound(7, 7)


def test_what_a_leaving_worker_holds_has_to_be_carried_by_the_rest(scale_down: ScaleDown, clock: Clock) -> None:
    """An operator's drained worker is not in Dynamo's discovery, and still answers."""
    assert waited(scale_down, clock, seen({"a": 500, "b": 400, "c": 500}, leaving="c"), ready=2) == Bound(1, 1)
    other = ScaleDown(ScaleDownRules(delay_s=10, reserve=0), (1, 9), clock)
    heavy = waited(other, clock, seen({"a": 500, "b": 400, "c": 8000}, leaving="c"), ready=2)
    assert heavy.reason is HoldReason.NO_DESTINATION


def test_a_worker_that_has_not_reported_is_neither_empty_nor_waited_for(scale_down: ScaleDown, clock: Clock) -> None:
    assert waited(scale_down, clock, seen({"a": 500, "b": 400, "c": 500}, stale="c")) == Bound(2, 2)
    other = ScaleDown(ScaleDownRules(delay_s=10, reserve=0), (1, 9), clock)
    assert waited(other, clock, seen({"a": 500, "b": 400, "c": 8000}, stale="c")).reason is HoldReason.NO_DESTINATION


def test_nothing_goes_without_a_current_state(scale_down: ScaleDown, clock: Clock) -> None:
    one_has_told_nothing, one_is_unknown = seen({"a": 100}), seen({"a": 0, "b": 0, "c": 0})
    for snapshot in (None, one_has_told_nothing, one_is_unknown):
        for _ in range(2):
            assert scale_down.decide(1, 2, snapshot) == Bound(2, 9, HoldReason.STALE)
            clock.now += 11


def test_bounds_hold_whatever_is_proposed(clock: Clock) -> None:
    fixed = ScaleDown(ScaleDownRules(delay_s=0), None, clock)
    for proposed in (0, 1, 2, 9):
        assert fixed.decide(proposed, 2, seen({"a": 0, "b": 0})) == Bound(2, 2)
    fewest = ScaleDown(ScaleDownRules(delay_s=0, reserve=0), (2, 3), clock)
    assert fewest.decide(1, 2, seen({"a": 0, "b": 0})) == Bound(2, 3)


def test_wrong_keys_are_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="'give-up-usage'; did you mean 'max-usage'"):
        parse({"scale-down": {"max-usage": 0.7, "give-up-usage": 0.85}})
    with pytest.raises(ConfigError, match="delay-s"):
        parse({"scale-down": {"delays": 3}})


def test_workers_that_are_starting_count_as_there(clock: Clock) -> None:
    starting = ScaleDown(ScaleDownRules(delay_s=10), (1, 4), clock, started=2)
    # One of two is ready, and the planner knows of no other.
    for proposed, ready in ((0, 0), (1, 1)):
        answer = starting.decide(proposed, ready, seen(dict.fromkeys("a"[:ready], 0)))
        assert answer == Bound(2, 4, HoldReason.MISSING)
    clock.now += 11
    assert starting.decide(1, 2, seen({"a": 0, "b": 0})).reason is HoldReason.DELAYED


def test_a_crashed_worker_counts_as_there_but_not_for_ever(scale_down: ScaleDown, clock: Clock) -> None:
    scale_down.decide(3, 3, seen({"a": 100, "b": 100, "c": 100}))
    assert scale_down.decide(1, 2, seen({"a": 100, "b": 100})) == Bound(3, 9, HoldReason.MISSING)
    assert scale_down.decide(2, 2, seen({"a": 100, "b": 100})).at_least == 3
    assert scale_down.decide(3, 2, seen({"a": 100, "b": 100})).at_least == 3
    clock.now += GONE_S + 1
    assert scale_down.decide(2, 2, seen({"a": 100, "b": 100})).at_least == 2


def test_what_was_let_through_is_not_asked_back(scale_down: ScaleDown, clock: Clock) -> None:
    assert waited(scale_down, clock, seen({"a": 2000, "b": 300})) == Bound(1, 1)
    # The number is being carried out: the planner proposes as many as it sees.
    leaving = seen({"a": 2000, "b": 300}, leaving="b")
    assert scale_down.decide(1, 1, leaving, scaling=True) == Bound(1, 9)
    assert scale_down.decide(1, 1, seen({"a": 2300})) == Bound(1, 9)


@pytest.mark.parametrize(("workers", "waits"), [(3, 10), (9, 5), (21, 2)])
def test_after_the_first_one_of_a_large_cluster_the_next_go_sooner(clock: Clock, workers: int, waits: int) -> None:
    """A quarter of the workers within the delay of ten seconds."""
    scale_down = ScaleDown(ScaleDownRules(delay_s=10, reserve=0), (1, 20), clock)
    names = [f"w{number:02}" for number in range(workers)]
    assert waited(scale_down, clock, seen(dict.fromkeys(names, 100))) == Bound(workers - 1, workers - 1)
    rest = seen(dict.fromkeys(names[1:], 100))
    for _ in range(waits):
        assert scale_down.decide(workers - 2, workers - 1, rest).reason is HoldReason.DELAYED
        clock.now += 1
    assert scale_down.decide(workers - 2, workers - 1, rest) == Bound(workers - 2, workers - 2)
