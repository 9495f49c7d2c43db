# SPDX-License-Identifier: Apache-2.0
"""Simulated clusters: nothing is lost, moves help where they can, even load is left alone, the router is Dynamo's."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from benchmarks.policy.cases import CASES, arrivals
from benchmarks.policy.runs import bound, fuller, saved, scenarios, variants
from components.errors import ConfigError
from planner_hooks.config import load, parse
from planner_hooks.simulate import traces
from planner_hooks.simulate.cluster import Cluster
from planner_hooks.simulate.dispatch import Dispatch, Router
from planner_hooks.simulate.model import WorkerModel
from planner_hooks.simulate.report import Report
from planner_hooks.simulate.scaling import Scaling
from planner_hooks.simulate.scenario import BURSTGPT, Scenario, requests, simulate
from planner_hooks.simulate.traces import Arrival
from planner_hooks.simulate.upkeep import Ending
from planner_hooks.simulate.worker import Request, Worker

POLICIES = Path("configs/policy.yaml")
SMALL = WorkerModel(capacity_tokens=20_000)


def test_requests_of_a_worker_that_ends_move_faster_than_they_end_or_are_computed_again() -> None:
    scenario = Scenario(BURSTGPT, 4, 0.4, 200.0, restarts=True)
    arrivals = requests(scenario)
    found = {ending: simulate(scenario, arrivals, ending=ending) for ending in Ending}
    assert all(report.unfinished == 0 for report in found.values())
    assert found[Ending.MOVE].emptying_s < 0.2 * found[Ending.WAIT].emptying_s
    assert found[Ending.MOVE].ended_stall_p99_ms < 0.5 * found[Ending.REPLAY].ended_stall_p99_ms
    assert found[Ending.REPLAY].migrations == found[Ending.WAIT].migrations == 0


def test_a_step_is_complete_at_its_end() -> None:
    """Whatever times round to: a request that moves would otherwise join a step that has begun."""
    worker = Worker(0, SMALL, time_s=1000.1)
    worker.join(Request(0, Arrival(0.0, 100, 10_000)))
    for step in range(1, 200):
        worker.advance(worker.boundary())
        assert worker.steps == step


def test_policies_leave_an_even_load_alone() -> None:
    arrivals = [Arrival(number / 60, 512, 256) for number in range(3600)]
    reports: list[Cluster] = []
    for policy in (None, load(POLICIES).build()):
        cluster = Cluster(WorkerModel(capacity_tokens=40_000), 4, policy=policy)
        cluster.run(arrivals)
        reports.append(cluster)
    assert reports[1].moves.by_policy.total() == 0
    without, with_policies = ([r.done_s for r in cluster.finished] for cluster in reports)
    assert with_policies == pytest.approx(without)


def test_long_answers_that_met_by_chance_are_spread() -> None:
    """The router sees prompts, and all long answers are on one worker."""
    arrivals = [Arrival(0.01 * n, 200, 3000 if n % 2 == 0 else 20) for n in range(24)]
    found = []
    for policy in (None, load(POLICIES).build()):
        cluster = Cluster(SMALL, 2, Dispatch.ROUND_ROBIN, policy)
        cluster.run(arrivals)
        found.append((max(r.done_s for r in cluster.finished), sum(w.preemptions for w in cluster.all_workers)))
    assert found[1][0] < 0.9 * found[0][0]
    assert found[1][1] < found[0][1]


def test_requests_that_share_a_prompt_stay_together() -> None:
    """Apart, each needs the whole prompt's KV."""
    arrivals = [Arrival(0.02 * n, 8200, 500, prefix=tuple(range(16))) for n in range(60)]
    cluster = Cluster(WorkerModel(capacity_tokens=30_000), 2, policy=load(POLICIES).build())
    cluster.run(arrivals)
    assert cluster.moves.by_policy.total() == 0
    assert len(cluster.finished) == 60


def test_a_worker_that_leaves_moves_its_requests_away_by_itself() -> None:
    arrivals = [Arrival(0.1 * i, 200, 1000) for i in range(12)]
    policy = parse({"policies": {}}).build()
    cluster = Cluster(SMALL, 3, Dispatch.ROUND_ROBIN, policy, scaling=Scaling(low=0.9, high=0.95, max_workers=3))
    cluster.run(arrivals)
    gone = [worker for worker in cluster.all_workers if worker.gone_s < cluster.time_s]
    assert gone and cluster.moves.by_policy["drain"] > 0
    assert gone[0].gone_s < min(request.done_s for request in cluster.finished)
    assert len(cluster.finished) == 12


def test_the_same_requests_give_the_same_figures() -> None:
    scenario = Scenario(BURSTGPT, 4, 0.8, 15.0, 40_000)
    first, again = (simulate(scenario, requests(scenario), load(POLICIES)) for _ in range(2))
    assert msgspec.structs.replace(first, decision_ms=0) == msgspec.structs.replace(again, decision_ms=0)


def test_no_placement_is_faster_than_the_bound() -> None:
    scenario = Scenario(BURSTGPT, 4, 0.3, 30.0)
    arrivals = requests(scenario)
    report, least = simulate(scenario, arrivals), bound(scenario, arrivals)
    assert least.ttft_p99_ms <= report.ttft_p99_ms
    assert least.tpot_p99_ms <= report.tpot_p99_ms


def test_the_router_follows_a_moved_request_that_the_frontend_repeats() -> None:
    holders: defaultdict[int, set[int]] = defaultdict(set)
    workers = [Worker(key, SMALL, holders=holders) for key in range(3)]
    router = Router(Dispatch.KV, SMALL, holders)
    router.reopen(workers, workers)
    request = Request(1, Arrival(0.0, 4096, 10, prefix=tuple(range(8))))
    router.book(request, workers[0], 4096)
    workers[1].remember(request.arrival)
    router.moved(request, workers[1], 0, 5)
    assert router.place(request.arrival) is workers[1]


@pytest.mark.parametrize("lines", ["{not json\n", "a,b\n1,2\n", ""])
def test_a_file_that_is_no_trace_is_told_as_an_error(tmp_path: Path, lines: str) -> None:
    path = tmp_path / "trace"
    path.write_text(lines)
    with pytest.raises(ConfigError):
        requests(Scenario(str(path), 4, 0.5, 10.0))


def test_a_trace_at_another_rate_has_that_rate_and_users_of_its_own_in_each_copy() -> None:
    trace = [Arrival(float(n), 1500, 10, prefix=(0, n, 1000 + n)) for n in range(1, 101)]
    found = traces.replay(trace, 10.0, 50.0)
    assert 400 <= len(found) <= 600
    seconds = [a.prefix[1] for a in found]
    assert len(set(seconds)) == len(seconds)
    assert all(a.prefix[0] == 0 for a in found)
    assert traces.reused(found) == pytest.approx(1 / 3, abs=0.05)


def test_load_after_burstgpts_statistics_has_its_means_and_some_turns() -> None:
    found = traces.burstgpt(200.0, 500.0)
    assert len(found) / 500.0 == pytest.approx(200.0, rel=0.1)
    assert sum(a.prompt_tokens for a in found) / len(found) == pytest.approx(621, rel=0.1)
    assert sum(a.output_tokens for a in found) / len(found) == pytest.approx(126, rel=0.1)
    assert max(a.prompt_tokens for a in found) <= 45_000
    assert traces.reused(found) > 0.02


def test_a_saving_counts_only_clusters_that_are_as_fast() -> None:
    scenario = Scenario(BURSTGPT, 4, 0.5, 60.0, 98_304, swings=True)
    arrivals = requests(scenario)
    scaling = Scaling(0.3, 0.6, min_workers=2, max_workers=4)
    report = simulate(scenario, arrivals, fuller(), scaling=scaling)
    results = list(_points(scenario, report))
    assert saved(results) == pytest.approx(0.2)


def _points(scenario: Scenario, report: Report) -> Iterator[object]:
    from benchmarks.policy.runs import Result

    hours, p99 = report.worker_hours, report.ttft_p99_ms
    yield Result("swing", scenario, "move", report, 0.5)
    for share, late in ((0.5, 1.1), (1.25, 0.9), (2.0, 0.5)):
        rival = msgspec.structs.replace(report, worker_hours=share * hours, ttft_p99_ms=late * p99)
        yield Result("swing", scenario, "wait", rival, 0.5)


def test_every_group_has_its_variants() -> None:
    found = scenarios([BURSTGPT], [16])
    assert {group: len(chosen) for group, chosen in found.items()} == {
        "steady": 36,
        "cases": 24,
        "restart": 6,
        "swing": 6,
    }
    short = msgspec.structs.replace(found["restart"][0], workers=4, seconds=20.0)
    assert [r.variant for r in variants("restart", short, requests(short), POLICIES)] == ["wait", "replay", "move"]


@pytest.mark.parametrize("name", CASES)
def test_a_case_gives_workers_the_load_that_it_is_asked_for(name: str) -> None:
    found = {load: arrivals(Scenario(name, 4, load, 60.0, 98_304)) for load in (0.3, 0.6)}
    assert len(found[0.6]) / len(found[0.3]) == pytest.approx(2.0, rel=0.2)
    assert all(0.0 <= a.time_s <= 90.0 for a in found[0.6])


def test_figures_are_those_of_the_highest_priority() -> None:
    scenario = Scenario("important", 4, 0.3, 30.0, 98_304)
    found = arrivals(scenario)
    report = simulate(scenario, found)
    assert 0 < report.requests <= sum(a.priority for a in found) < 0.1 * len(found)
    assert report.unfinished == 0


def test_the_simulated_router_chooses_as_dynamos_own_selector() -> None:
    """Loads alone; Dynamo's selector learns what is cached from the KV events of live workers."""
    core = pytest.importorskip("dynamo._core")
    import asyncio

    async def compare() -> tuple[int, int]:
        service = core.SelectionService(indexer_threads=1)
        block, count, chooser = 16, 5, random.Random(3)
        for key in range(count):
            place = {
                "endpoint": f"tcp://127.0.0.1:{41000 + key}",
                "kv_events_endpoint": f"tcp://127.0.0.1:{42000 + key}",
            }
            sizes = {"block_size": block, "total_kv_blocks": 50_000, "max_num_batched_tokens": 8192}
            await service.upsert_worker({"worker_id": key, "model_name": "m", **place, **sizes})
        model = WorkerModel(prefix_block_tokens=block)
        holders: defaultdict[int, set[int]] = defaultdict(set)
        workers = [Worker(key, model, holders=holders) for key in range(count)]
        router = Router(Dispatch.KV, model, holders)
        router.reopen(workers, workers)
        same, running = 0, []
        for number in range(200):
            tokens = block * chooser.randrange(4, 250)
            reply = await service.select_and_reserve(
                {"token_ids": [number] * tokens, "model_name": "m", "selection_id": str(number)}
            )
            costs = router._to_compute + router._used
            request = Request(number, Arrival(0.0, tokens, 1))
            # Among equals Dynamo chooses as it likes.
            same += costs[reply["worker_id"]] == costs.min()
            router.book(request, workers[reply["worker_id"]], tokens)
            running.append(request)
            if chooser.random() < 0.6:
                done = running[chooser.randrange(len(running))]
                await service.prefill_complete(str(done.key))
                router.computed(done)
            if chooser.random() < 0.3:
                gone = running.pop(chooser.randrange(len(running)))
                await service.free_reservation(str(gone.key))
                router.free(gone)
        service.shutdown()
        return same, 200

    same, all_of_them = asyncio.run(compare())
    assert same == all_of_them
