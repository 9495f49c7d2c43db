# SPDX-License-Identifier: Apache-2.0
"""The plugins in Dynamo's real planner engine, in-process and over gRPC, beside workers without engines."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("filterpy", reason="the planner needs the extra 'planner'")

from dynamo.common.forward_pass_metrics import (
    ForwardPassMetrics,
    QueuedRequestMetrics,
    ScheduledRequestMetrics,
    encode,
)
from dynamo.planner.config.planner_config import PlannerConfig
from dynamo.planner.core.types import (
    EngineCapabilities,
    FpmObservations,
    ScheduledTick,
    TickInput,
    WorkerCapabilities,
    WorkerCounts,
)
from dynamo.planner.plugins.clock import VirtualClock
from dynamo.planner.plugins.orchestrator.engine_adapter import OrchestratorEngineAdapter

from components.engine.protocol import EngineStats
from components.migration.messages import WorkerState
from planner_hooks.decider import Decider
from planner_hooks.observe import Observer
from planner_hooks.plugin import MigrationPlugin, ScaleDownPlugin
from planner_hooks.rules import Cost
from planner_hooks.server import Service, start
from planner_hooks.table import Table, Tables
from tests import fake_workers
from tests.fake_workers import INFO, info_of

CAPACITY = 10_000
POLICIES = "{consolidate: {reserve: 0}, balance: {}}"
_NAMES = itertools.count()


def planner_file(**more: Any) -> PlannerConfig:
    return PlannerConfig.model_validate(
        {
            "environment": "virtual",
            "backend": "vllm",
            "mode": "disagg",
            "model_name": "m",
            "prefill_engine_num_gpu": 1,
            "decode_engine_num_gpu": 1,
            "optimization_target": "load",
            "prefill_scale_up_queue_tokens": 100_000,
            "prefill_scale_down_queue_tokens": 1,
            "decode_scale_up_kv_rate": 90,
            "decode_scale_down_kv_rate": 40,
            "load_adjustment_interval_seconds": 2,
            "scheduling": {"scale_interval_seconds": 2} | more.pop("scheduling", {}),
            "pre_deployment_sweeping_mode": "none",
            "live_dashboard_port": 0,
            "control_api_port": 0,
            "report_interval_hours": None,
            "plugin_registration": {"auth": {"trusted_sources": ["allow_unauthenticated"]}} | more,
        }
    )


def metrics(worker: int, tokens: int, counter: int = 1) -> ForwardPassMetrics:
    return ForwardPassMetrics(
        worker_id=str(worker),
        dp_rank=0,
        counter_id=counter,
        wall_time=0.02,
        scheduled_requests=ScheduledRequestMetrics(num_decode_requests=2, sum_decode_kv_tokens=tokens),
        queued_requests=QueuedRequestMetrics(),
    )


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> fake_workers.Workers:
    """Two decode workers, whom all deciders ask."""
    cluster = fake_workers.Workers(2)

    async def connect(*_: Any) -> Tables:
        return Tables(cluster)

    monkeypatch.setattr(Tables, "connect", connect)
    return cluster


@pytest.fixture
def decider(policy: str, workers: fake_workers.Workers) -> Decider:
    """What stands behind the plugins; it needs no runtime."""
    decider = Decider.shared(policy)
    decider._runtime = object()
    return decider


async def decisions(config: PlannerConfig, tokens: list[int], ticks: int, decider: Decider) -> list[int]:
    """Decode workers that the planner decides on, tick after tick; as many as there are when nothing changes."""
    caps = EngineCapabilities(num_gpu=1, max_kv_tokens=CAPACITY, context_length=4096, max_num_seqs=16)
    adapter = OrchestratorEngineAdapter(config, WorkerCapabilities(prefill=caps, decode=caps), clock=VirtualClock())
    await adapter.bootstrap_plugins()
    adapter.initial_tick(0.0)
    found = []
    try:
        for tick in range(ticks):
            seen = {(str(i), 0): metrics(i, t, tick) for i, t in enumerate(tokens, 1)}
            given = TickInput(
                now_s=2.0 * (tick + 1),
                worker_counts=WorkerCounts(1, len(tokens), 1, len(tokens)),
                fpm_observations=FpmObservations(prefill={("9", 0): metrics(9, 0, tick)}, decode=seen),
            )
            scheduled = ScheduledTick(
                at_s=2.0 * (tick + 1), at_monotonic_s=2.0 * (tick + 1), run_load_scaling=True, need_worker_fpm=True
            )
            effects = await adapter.tick(scheduled, given)
            if decider._deciding is not None:
                await decider._deciding
            found.append(effects.scale_to.num_decode if effects.scale_to else len(tokens))
    finally:
        await adapter.shutdown()
    return found


@pytest.fixture
def policy(tmp_path: Path) -> str:
    path = tmp_path / f"policy-{next(_NAMES)}.yaml"
    path.write_text(f"interval-s: 2\nscale-down: {{delay-s: 0, reserve: 0}}\npolicies: {POLICIES}\n")
    return str(path)


def in_process(policy: str, bounds: tuple[int, int] | None = (1, 3), **more: Any) -> list[dict[str, Any]]:
    shared = {"module": "planner_hooks.plugin", "priority": 5, "needs": ["observations.fpm", "observations.workers"]}
    arguments = {"policy_file": policy}
    return [
        shared | {"class": "MigrationPlugin", "plugin_id": "m", "plugin_type": "propose", "kwargs": arguments},
        shared
        | {"class": "ScaleDownPlugin", "plugin_id": "s", "plugin_type": "constrain"}
        | {"kwargs": arguments | {"decode_workers": bounds} | more},
    ]


async def test_a_reduction_goes_through_once_the_workers_have_told_their_state(policy: str, decider: Decider) -> None:
    plugins = planner_file(in_process_plugins=in_process(policy))
    assert (await decisions(plugins, [1000, 3000], 3, decider))[1:] == [1, 1]


async def test_a_reduction_waits_for_room_on_the_rest(
    policy: str, decider: Decider, workers: fake_workers.Workers
) -> None:
    for engine in workers.engines.values():
        engine.table = [info_of(f"r-{id(engine)}-{i}") for i in range(4)]
    plugins = planner_file(in_process_plugins=in_process(policy))
    assert await decisions(plugins, [1000, 3000], 3, decider) == [2, 2, 2]


async def test_what_a_policy_would_do_without_is_a_wish_where_the_planner_decides_the_number(
    policy: str, decider: Decider, workers: fake_workers.Workers
) -> None:
    """Dynamo's own planner wants no fewer at this load; who stops the worker drains it, and nobody else."""
    plugins = planner_file(in_process_plugins=in_process(policy))
    assert (await decisions(plugins, [6000, 6000], 3, decider))[1:] == [1, 1]
    assert not any(state.cordoned for state in workers.states.values())


async def test_what_a_policy_would_do_without_is_drained_where_nobody_decides_the_number(
    policy: str, decider: Decider, workers: fake_workers.Workers
) -> None:
    plugins = planner_file(in_process_plugins=in_process(policy, bounds=None))
    assert set(await decisions(plugins, [6000, 6000], 4, decider)) == {2}
    assert decider._controller is not None
    await decider._controller.idle()
    assert [state.draining for state in workers.states.values()] == [True, False]


async def test_a_worker_that_is_the_first_to_be_ready_does_not_become_the_only_one(
    policy: str, decider: Decider
) -> None:
    plugins = planner_file(in_process_plugins=in_process(policy, started={"decode": 2, "prefill": 1}))
    assert set(await decisions(plugins, [1000], 6, decider)) == {2}


async def test_growth_is_let_through_up_to_the_bound(
    policy: str, decider: Decider, workers: fake_workers.Workers
) -> None:
    plugins = planner_file(in_process_plugins=in_process(policy))
    for engine in workers.engines.values():
        engine.table = [info_of(f"r-{id(engine)}-{i}") for i in range(9)]
    assert (await decisions(plugins, [9500, 9500], 2, decider))[-1] == 3
    assert (await decisions(plugins, [9500, 9500, 9500], 2, decider))[-1] == 3


async def test_the_same_plugins_over_grpc(policy: str, decider: Decider) -> None:
    service = Service(MigrationPlugin(policy), ScaleDownPlugin(policy, [1, 3]))
    server, address = await start("127.0.0.1:0", service)
    try:
        entry = {"priority": 5, "endpoint": f"grpc://{address}", "needs": ["observations.fpm", "observations.workers"]}
        external = [
            entry | {"plugin_id": "m", "plugin_type": "propose"},
            entry | {"plugin_id": "s", "plugin_type": "constrain"},
        ]
        config = planner_file(scheduling={"external_plugins": external}, transport={"allow_insecure_grpc": True})
        assert (await decisions(config, [1000, 3000], 3, decider))[1:] == [1, 1]
    finally:
        await server.stop(grace=0.1)


def test_a_worker_whose_metrics_stop_is_held_as_stale() -> None:
    now = 100.0
    observer = Observer(Cost(), lambda: now)
    stats = EngineStats(1, 0, 0, 0, 90, 100)
    table = Table("00000007")
    table.take(WorkerState("00000007", "decode", stats, info=INFO), now, first=True)

    def age() -> float:
        table._at = now
        return observer.capture(observer.look([table], ())).workers[0].report_age_s

    observer.join({"7/0": encode(metrics(7, 500, counter=1))})
    assert age() == 0.0
    now = 130.0
    observer.join({"7/0": encode(metrics(7, 500, counter=1)), "junk": b"?", "8/0": b"\xff"})
    assert age() == 30.0
    observer.join({"7/0": encode(metrics(7, 500, counter=2))})
    assert age() == 0.0
