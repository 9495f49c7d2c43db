# SPDX-License-Identifier: Apache-2.0
"""Counts for each end of a migration, and its part of a request's trace."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import generate_latest

from components.engine.protocol import EngineStats
from components.metrics import names
from components.metrics import spans as spans_of_moves
from components.metrics.worker import Gauges, WorkerMetrics
from components.migration import messages as told
from components.migration.events import Event
from tests import fake_workers


def test_a_worker_shows_its_last_report_and_nothing_before_it() -> None:
    now = Gauges()
    worker = WorkerMetrics(lambda: now, lambda: None)
    assert b"kv_blocks" not in generate_latest(worker.registry)
    now = Gauges(EngineStats(2, 1, 0, 0, free_blocks=30, total_blocks=100, leases_expired_total=4))
    assert worker.registry.get_sample_value(names.KV_BLOCKS.full_name, {"state": "used"}) == 70
    assert worker.registry.get_sample_value(names.LEASES.full_name) == 4


def done(**more: object) -> told.MoveRecord:
    fields = {"rounds": 2, "bytes": 100, "lane": "nixl", "downtime_s": 0.03} | more
    return told.MoveRecord("r", "a", "b", told.Mode.LIVE, **{"ok": True, **fields})  # type: ignore[arg-type]


def shown(worker: WorkerMetrics, metric: names.Metric, **labels: str) -> float | None:
    return worker.registry.get_sample_value(metric.full_name, labels)


def test_a_source_counts_its_moves_with_what_they_cost() -> None:
    worker = WorkerMetrics(Gauges, lambda: None)
    worker.moved(done(), told.Mode.LIVE)
    worker.moved(done(ok=False, code="no_room", reason="3 blocks are missing"), told.Mode.LIVE)
    worker.moved(done(code="integrity", reason="block 3 differs"), told.Mode.STOP_AND_COPY)
    assert shown(worker, names.MOVES, mode="live", outcome="done") == 2
    assert shown(worker, names.MOVES, mode="live", outcome="failed") == 1
    assert shown(worker, names.REFUSALS, reason="no_room") == 1
    assert shown(worker, names.BYTES, mode="live", lane="nixl") == 200
    assert shown(worker, names.INTEGRITY) == 1
    assert shown(worker, names.FALLBACKS, mode="stop-and-copy", reason="integrity") == 1


async def test_a_worker_shows_what_came_in_and_what_it_passes_on() -> None:
    cluster = fake_workers.Workers(1)
    state, engine = cluster.states[1], cluster.engines[1]
    registry = state.metrics()
    engine.table = [fake_workers.info_of("a")]
    state.requests.events[Event.LANDED] += 3
    await state.drain(0)
    text = generate_latest(registry).decode()
    assert 'landings_total{outcome="done"} 3.0' in text and "live_migration_cordoned 1.0" in text
    assert 'drains_total{outcome="done"} 1.0' in text and "_created" not in text
    # The scrape has woken the engine's report: the next one has it.
    while state.table.stats is None:
        await asyncio.sleep(0.01)
    assert registry.get_sample_value(names.KV_BLOCKS.full_name, {"state": "used"}) == 10


def test_a_move_is_a_part_of_its_requests_trace_with_the_time_without_a_token() -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter").InMemorySpanExporter()
    provider = sdk.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(memory))
    parent = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    spans_of_moves.record(done(total_s=2.0, downtime_s=0.5), 100.0, provider.get_tracer("test"), parent)
    frozen, moved = memory.get_finished_spans()
    assert (moved.name, moved.start_time, moved.end_time) == ("live_migration", 98_000_000_000, 100_000_000_000)
    assert f"{moved.parent.span_id:016x}" == "b7ad6b7169203331" and moved.attributes["live_migration.lane"] == "nixl"
    assert (frozen.name, frozen.start_time) == ("frozen", 99_500_000_000)
    assert frozen.parent.span_id == moved.context.span_id
    spans_of_moves.record(done(ok=False, code="no_room", downtime_s=0.0), 100.0, provider.get_tracer("test"), {})
    assert memory.get_finished_spans()[-1].status.description == "no_room: "
