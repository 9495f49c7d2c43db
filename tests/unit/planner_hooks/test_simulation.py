# SPDX-License-Identifier: Apache-2.0
"""Simulated clusters: nothing is lost, even load is left alone, policies gain from uneven load and idle workers."""

from __future__ import annotations

from functools import cache

import pytest

from benchmarks.policy.cost import Point, prices
from benchmarks.policy.runs import WAVES, Case, Result, Variant, cases, requests, run
from planner_hooks.config import parse
from planner_hooks.simulate.cluster import Cluster
from planner_hooks.simulate.model import Slo, WorkerModel
from planner_hooks.simulate.scaling import Scaling
from planner_hooks.simulate.traces import Arrival, Shape

MODEL = WorkerModel(capacity_tokens=20_000)
ALL = ("defragment", "priority", "balance")


@cache
def ran(shape: Shape, load: float, duration_s: float, variant: Variant) -> Result:
    case = Case(4, shape, load, duration_s)
    return run(case, variant, requests(case, MODEL), MODEL, Slo())


@pytest.mark.parametrize("shape", [Shape.STICKY, Shape.HEAVY])
def test_policies_lower_p99_ttft_of_an_uneven_load(shape: Shape) -> None:
    without, everything = (ran(shape, 0.95, 40.0, Variant("", policies)).report for policies in ((), ALL))
    assert everything.ttft_p99_ms < 0.7 * without.ttft_p99_ms
    assert everything.preemptions <= without.preemptions
    assert everything.unfinished == without.unfinished == 0


def test_policies_leave_an_even_load_alone() -> None:
    without, everything = (ran(Shape.EVEN, 0.9, 20.0, Variant("", policies)).report for policies in ((), ALL))
    assert everything.migrations == 0
    assert everything.ttft_p99_ms <= 1.02 * without.ttft_p99_ms


def test_a_planner_that_follows_the_load_needs_fewer_worker_hours_and_loses_nothing() -> None:
    fixed, scaled = (ran(Shape.WAVE, 0.6, 400.0, variant).report for variant in (WAVES[0], WAVES[4]))
    assert scaled.worker_hours < 0.85 * fixed.worker_hours
    assert scaled.ttft_p99_ms < 2 * fixed.ttft_p99_ms
    assert scaled.unfinished == 0
    assert scaled.requests == fixed.requests


def test_a_worker_that_leaves_moves_its_requests_away_by_itself() -> None:
    arrivals = [Arrival(0.1 * i, 200, 1000) for i in range(12)]
    cluster = Cluster(MODEL, 3, policy=parse({"policies": {}}).build(), scaling=Scaling(low=0.0, max_workers=3))
    leaving = cluster.workers[0]
    leaving.leaving = True
    cluster.run(arrivals)
    assert cluster.moves.by_policy == {"drain": 4}
    assert leaving.gone_s < min(request.done_s for request in cluster.finished)
    assert len(cluster.finished) == 12


def test_the_same_requests_give_the_same_figures() -> None:
    case, variant = Case(4, Shape.STICKY, 0.8, 15.0), Variant("", ALL)
    first, again = (run(case, variant, requests(case, MODEL), MODEL, Slo()).report for _ in range(2))
    assert (first.ttft_p99_ms, first.migrations) == (again.ttft_p99_ms, again.migrations)


def test_large_clusters_are_simulated_for_a_shorter_time() -> None:
    found = cases([4, 1024], [0.6, 0.8], 150.0)
    assert {c.duration_s for c in found if c.workers == 1024} == {30.0}
    assert {c.shape for c in found if c.workers == 1024} == {Shape.STICKY, Shape.HEAVY, Shape.EVEN}
    assert sum(c.shape is Shape.WAVE for c in found if c.workers == 4) == 2


def test_the_price_is_that_of_the_cheapest_cluster_that_is_as_fast() -> None:
    ours = ran(Shape.WAVE, 0.6, 400.0, WAVES[4])
    hours, p99 = ours.report.worker_hours, ours.report.ttft_p99_ms
    points = [
        Point(ours.case, False, None, 4, 0.5 * hours, 1.1 * p99),
        Point(ours.case, False, None, 5, 2.0 * hours, 0.9 * p99),
        Point(ours.case, False, None, 6, 2.5 * hours, 0.5 * p99),
        Point(ours.case, True, None, 4, 0.7 * hours, 0.9 * p99),
    ]
    (price,) = prices([ours], points)
    assert price.point == points[1]
    assert price.saved == pytest.approx(0.5)
    (price,) = prices([ours], points[:1])
    assert price.point is None
