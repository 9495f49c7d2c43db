# SPDX-License-Identifier: Apache-2.0
"""Each policy on small clusters that can be checked by hand."""

from __future__ import annotations

from components.engine.protocol import RequestPhase
from components.migration.messages import Mode
from planner_hooks.config import parse
from planner_hooks.plan import HoldReason, Plan
from planner_hooks.policies import BUILT_IN
from planner_hooks.snapshot import Capture, Snapshot
from tests.unit.planner_hooks.clusters import cluster, request


def decide(name: str, capture: Capture, **settings: object) -> Plan:
    limits = {"limits": {"max-moves-per-worker": 8, "max-moves-per-pair": 8}}
    file = parse({**limits, "policies": {name: settings}})
    return file.build().plan(Snapshot.of(capture, file.controller.limits.stale_after_s))


def reasons(plan: Plan) -> set[HoldReason]:
    return {hold.reason for hold in plan.holds}


def test_balance_moves_from_hot_to_cold_until_the_gap_is_closed() -> None:
    capture = cluster([request(f"r{i}", "w0", 1000) for i in range(9)])
    plan = decide("balance", capture)
    assert len(plan.moves) == 4
    assert {(m.src, m.dst) for m in plan.moves} == {("w0", "w1")}
    assert all(m.gain_s > m.cost_s for m in plan.moves)


def test_balance_leaves_an_even_load_alone() -> None:
    capture = cluster([request(f"r{i}", f"w{i % 2}", 1000) for i in range(12)])
    plan = decide("balance", capture)
    assert not plan.moves
    assert HoldReason.BALANCED in reasons(plan)


def test_balance_counts_queued_demand_and_sends_the_waiting_request_without_kv() -> None:
    running = [request(f"r{i}", "w0", 2000) for i in range(4)] + [request("o", "w1", 3000)]
    waiting = request("q", "w0", 3000, phase=RequestPhase.WAITING)
    plan = decide("balance", cluster([*running, waiting]))
    assert "q" in {m.request_id for m in plan.moves}
    assert next(m for m in plan.moves if m.request_id == "q").mode is Mode.REPLAY


def test_balance_leaves_a_queue_that_does_not_wait_for_kv_where_its_prefixes_are() -> None:
    queue = [request(f"q{i}", "w0", 1000, phase=RequestPhase.WAITING) for i in range(9)]
    assert not decide("balance", cluster(queue)).moves


def test_balance_spreads_a_queue_in_one_decision_whatever_copies_may_go_on() -> None:
    running = [request(f"r{i}", "w0", 1000) for i in range(9)]
    queue = [request(f"q{i}", "w0", 500, phase=RequestPhase.WAITING) for i in range(12)]
    file = parse({"limits": {"max-moves-per-worker": 1, "max-moves-per-pair": 1}, "policies": {"balance": {}}})
    plan = file.build().plan(Snapshot.of(cluster([*running, *queue], 3)))
    sent = [m for m in plan.moves if m.request_id.startswith("q")]
    assert len(sent) > 6
    assert {m.dst for m in sent} == {"w1", "w2"}
    assert all(m.cost_s == 0 for m in sent)
    assert len(plan.moves) - len(sent) <= 1


def test_balance_keeps_requests_that_end_before_the_move_pays() -> None:
    capture = cluster([request(f"r{i}", "w0", 1000, remaining_tokens=1.0) for i in range(9)])
    plan = decide("balance", capture)
    assert not plan.moves
    assert HoldReason.NOT_WORTH in reasons(plan)


def test_no_policy_moves_what_a_leaving_worker_moves_away_by_itself() -> None:
    requests = [request(f"r{i}", "w0", 1000) for i in range(9)]
    requests += [request("big", "w0", 4000, phase=RequestPhase.WAITING)]
    for name in BUILT_IN:
        assert not decide(name, cluster(requests, {"w0": {"draining": True}, "w1": {}, "w2": {}})).moves


def test_defragment_sends_the_prompt_to_where_it_fits() -> None:
    requests = [request(f"r{i}", "w0", 3000) for i in range(3)]
    requests += [request("big", "w0", 4000, phase=RequestPhase.WAITING), request("x", "w1", 1000)]
    (move,) = decide("defragment", cluster(requests)).moves
    assert (move.request_id, move.dst, move.mode) == ("big", "w1", Mode.REPLAY)


def test_defragment_makes_room_where_the_prompt_fits_nowhere() -> None:
    requests = [request(f"{w}{i}", w, 1800) for w in ("w0", "w1", "w2") for i in range(3)]
    requests.append(request("big", "w0", 6000, phase=RequestPhase.WAITING))
    plan = decide("defragment", cluster(requests, 3))
    assert len(plan.moves) == 1
    assert plan.moves[0].src == "w0"
    assert "room for big" in plan.moves[0].reason


def test_defragment_says_when_a_prompt_is_larger_than_any_worker() -> None:
    capture = cluster([request("huge", "w0", 20_000, phase=RequestPhase.WAITING)])
    assert HoldReason.TOO_LARGE in reasons(decide("defragment", capture))


def test_consolidate_retires_the_cheapest_worker_and_leaves_its_requests_to_it() -> None:
    requests = [request("a", "w0", 2000), request("b", "w1", 1000), request("c", "w2", 2000)]
    plan = decide("consolidate", cluster(requests, 3))
    assert plan.retire == ("w1",)
    assert not plan.moves


def test_consolidate_does_not_take_a_worker_for_empty_that_has_not_reported() -> None:
    requests = [request("a", "w0", 2000), request("b", "w1", 1000), request("c", "w2", 9000)]
    workers: dict[str, dict[str, object]] = {"w0": {}, "w1": {}, "w2": {"report_age_s": 60.0}}
    assert not decide("consolidate", cluster(requests, workers)).retire


def test_consolidate_keeps_a_busy_cluster_and_wakes_retired_workers() -> None:
    busy = [request(f"r{i}", f"w{i % 2}", 1000) for i in range(14)]
    assert not decide("consolidate", cluster(busy)).retire
    plan = decide(
        "consolidate", cluster([*busy, request("x", "w0", 2000)], {"w0": {}, "w1": {}, "w2": {"draining": True}})
    )
    assert plan.release == ("w2",)


def test_consolidate_lets_a_share_of_a_large_cluster_leave_at_once() -> None:
    workers: dict[str, dict[str, object]] = {f"w{i}": {"draining": i < 2} for i in range(20)}
    capture = cluster([request(f"r{i}", f"w{i}", 500) for i in range(20)], workers)
    assert len(decide("consolidate", capture).retire) == 1
    assert not decide("consolidate", capture, **{"max-leaving-share": 0.1}).retire


def test_few_workers_keep_a_reserve_that_many_have_anyway() -> None:
    def retired(workers: int) -> tuple[str, ...]:
        load = [request(f"r{i}", f"w{i}", 3500) for i in range(workers)]
        return decide("consolidate", cluster(load, workers)).retire

    assert retired(2) == ()
    assert len(retired(8)) == 1


def test_later_policies_see_a_retired_worker_as_leaving() -> None:
    requests = [request(f"r{i}", "w0", 1000) for i in range(4)]
    file = parse({"policies": {"consolidate": {"reserve": 0}, "balance": {"high": 0.1}}})
    plan = file.build().plan(Snapshot.of(cluster(requests, 2)))
    assert plan.retire == ("w1",)
    assert not plan.moves


def test_a_worker_that_gets_requests_is_not_retired_by_the_same_plan() -> None:
    requests = [request(f"r{i}", "w0", 1000) for i in range(4)]
    file = parse({"policies": {"balance": {"high": 0.1}, "consolidate": {"reserve": 0}}})
    plan = file.build().plan(Snapshot.of(cluster(requests, 2)))
    assert {move.dst for move in plan.moves} == {"w1"}
    assert plan.retire == ()
    assert HoldReason.ALREADY_MOVING in reasons(plan)


def test_stale_workers_take_no_part_and_nothing_at_all_is_a_hold() -> None:
    requests = [request(f"r{i}", "w0", 1000) for i in range(8)]
    stale = cluster(requests, {"w0": {}, "w1": {"report_age_s": 60.0}})
    assert not decide("balance", stale).moves
    plan = decide("balance", cluster([], {}))
    assert reasons(plan) == {HoldReason.NO_METRICS}
