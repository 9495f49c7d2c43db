# SPDX-License-Identifier: Apache-2.0
"""Invariants of every plan on every cluster; moves end under a constant load."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings

from components.engine.protocol import RequestPhase
from planner_hooks.config import PolicyFile, parse
from planner_hooks.policies import BUILT_IN
from planner_hooks.snapshot import Capture, Snapshot
from tests.unit.planner_hooks.clusters import captures, settled

ONE_OR_ALL = [*BUILT_IN, "all", "all reversed"]


def policy_file(name: str, **limits: object) -> PolicyFile:
    names = {"all": [*BUILT_IN], "all reversed": [*BUILT_IN][::-1]}.get(name, [name])
    return parse({"limits": limits, "policies": {n: {} for n in names}})


def check_plan(capture: Capture, file: PolicyFile) -> None:
    """Every invariant, from the views alone."""
    limits = file.controller.limits
    plan = file.build().plan(Snapshot.of(capture, limits.stale_after_s))
    workers = {w.worker: w for w in capture.workers}
    requests = {r.request_id: r for r in capture.requests}
    assert len(plan.moves) <= limits.max_moves_per_tick
    assert len({m.request_id for m in plan.moves}) == len(plan.moves)
    per_worker: Counter[str] = Counter()
    pairs: Counter[tuple[str, str]] = Counter()
    arriving: Counter[str] = Counter()
    seats: Counter[str] = Counter()
    for move in plan.moves:
        request, src, dst = requests[move.request_id], workers[move.src], workers[move.dst]
        assert request.worker == move.src != move.dst
        assert request.not_migratable is None
        assert not request.moving
        assert request.phase in (RequestPhase.DECODE, RequestPhase.WAITING, RequestPhase.PREEMPTED)
        assert request.since_move_s >= limits.cooldown_s
        assert not (request.came_from == move.dst and request.since_move_s < limits.no_return_s)
        assert not dst.draining
        assert not {move.src, move.dst} & set(plan.retire)
        assert max(src.report_age_s, dst.report_age_s) <= limits.stale_after_s
        copies = request.phase is RequestPhase.DECODE
        if copies:
            per_worker.update((move.src, move.dst))
        pairs[move.src, move.dst] += copies
        arriving[move.dst] += request.need_tokens
        seats[move.dst] += 1
    assert all(count <= limits.max_moves_per_worker for count in per_worker.values())
    assert all(count <= limits.max_moves_per_pair for count in pairs.values())
    assert not any((b, a) in pairs for a, b in pairs)
    for name, tokens in arriving.items():
        there = workers[name]
        total = there.held_tokens + there.queued_tokens + tokens
        assert total <= limits.max_destination_usage * there.capacity_tokens
        assert there.running + there.waiting + seats[name] <= there.max_seqs


@pytest.mark.parametrize("name", ONE_OR_ALL)
@given(capture=captures())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_no_plan_breaks_a_rule(name: str, capture: Capture) -> None:
    check_plan(capture, policy_file(name))
    tight = {"max-moves-per-tick": 2, "max-moves-per-worker": 1, "max-moves-per-pair": 1}
    check_plan(capture, policy_file(name, **tight))


@pytest.mark.parametrize("name", ONE_OR_ALL)
@given(capture=captures())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_a_static_load_comes_to_rest(name: str, capture: Capture) -> None:
    file = policy_file(name)
    policy = file.build()
    for _ in range(200):
        plan = policy.plan(Snapshot.of(capture, file.controller.limits.stale_after_s))
        if not (plan.moves or plan.retire or plan.release):
            return
        capture = settled(capture, plan)
    raise AssertionError(f"{name} still moves requests after 200 decisions on a static load")


@given(capture=captures())
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_policies_are_pure(capture: Capture) -> None:
    policy = policy_file("all").build()
    snapshot = Snapshot.of(capture, 5.0)
    assert policy.plan(snapshot) == policy.plan(snapshot) == policy.plan(Snapshot.of(capture, 5.0))
