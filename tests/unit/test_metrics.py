# SPDX-License-Identifier: Apache-2.0
"""What is counted for which end of a migration, and the parts of a request's trace."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from prometheus_client import generate_latest

from components.engine.protocol import EngineStats
from components.messages import EventKind, Mode, MoveRecord, StreamEvent, StreamInfo
from components.metrics import names
from components.metrics.router import RouterMetrics
from components.metrics.traces import Span, record, spans
from components.metrics.worker import WorkerMetrics


def move(ok: bool, reason: str = "", mode: Mode = Mode.LIVE) -> MoveRecord:
    return MoveRecord("r", "a", "b", mode, ok, reason, rounds=2, bytes=100, lane="nixl", downtime_s=0.03)


@pytest.fixture
def metrics() -> RouterMetrics:
    return RouterMetrics(lambda: (), lambda: ())


def value(metrics: RouterMetrics, metric: names.Metric, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(metric.full_name, labels)


def test_a_done_move_counts_its_bytes_and_a_refused_one_its_reason(metrics: RouterMetrics) -> None:
    metrics.moved(move(True))
    metrics.moved(move(False, "no_room: 12 blocks are missing"))
    assert value(metrics, names.MOVES, mode="live", outcome="done") == 1
    assert value(metrics, names.MOVES, mode="live", outcome="failed") == 1
    assert value(metrics, names.REFUSALS, reason="no_room") == 1
    assert value(metrics, names.BYTES, mode="live", lane="nixl") == 100


def test_wrong_bytes_are_counted_although_the_move_went_on(metrics: RouterMetrics) -> None:
    metrics.moved(move(True, "integrity: block 3 differs"))
    assert value(metrics, names.INTEGRITY) == 1


def test_each_event_has_its_reason(metrics: RouterMetrics) -> None:
    metrics.fell_back(Mode.LIVE, "deadline: too slow")
    metrics.prefilled_locally("no_worker")
    metrics.replayed("worker_lost")
    metrics.drained(3.0, done=False)
    assert value(metrics, names.FALLBACKS, mode="live", reason="deadline") == 1
    assert value(metrics, names.LOCAL_PREFILLS, reason="no_worker") == 1
    assert value(metrics, names.REPLAYS, reason="worker_lost") == 1
    assert value(metrics, names.DRAINS, outcome="failed") == 1


def test_a_worker_shows_its_last_report_and_nothing_before_it() -> None:
    worker = WorkerMetrics()
    assert generate_latest(worker.registry) == b""
    worker.stats = EngineStats(2, 1, 0, 0, free_blocks=30, total_blocks=100, leases_expired_total=4)
    assert worker.registry.get_sample_value(names.KV_BLOCKS.full_name, {"state": "used"}) == 70
    assert worker.registry.get_sample_value(names.LEASES.full_name) == 4


LIFE = tuple(
    StreamEvent(float(at), kind, worker)
    for at, (kind, worker) in enumerate(
        [
            (EventKind.ARRIVED, ""),
            (EventKind.PREFILL, "p"),
            (EventKind.SWITCHED, "a"),
            (EventKind.COPYING, "b"),
            (EventKind.FROZEN, "a"),
            (EventKind.SWITCHED, "b"),
            (EventKind.ENDED, ""),
        ]
    )
)


def test_a_trace_follows_a_request_over_all_workers() -> None:
    assert list(spans(LIFE)) == [
        Span("prefill", "p", 1, 2),
        Span("transfer", "b", 3, 5),
        Span("decode", "a", 2, 5),
        Span("decode", "b", 5, 6),
    ]


def test_the_trace_has_one_root_and_exact_times() -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter").InMemorySpanExporter()
    provider = sdk.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(memory))
    record(StreamInfo("r", "b", 10, 20, 6.0, events=LIFE), provider.get_tracer("test"))
    *parts, root = memory.get_finished_spans()
    assert {part.parent.span_id for part in parts} == {root.context.span_id}
    assert (root.start_time, root.end_time) == (0, 6_000_000_000)
    assert [part.name for part in parts] == ["prefill", "transfer", "decode", "decode"]


def test_gauges_count_streams_and_workers() -> None:
    moving = SimpleNamespace(lock=SimpleNamespace(locked=lambda: True))
    worker = SimpleNamespace(role="decode", available=False)
    metrics = RouterMetrics(lambda: [moving], lambda: [worker])  # type: ignore[list-item]
    assert value(metrics, names.STREAMS, state="moving") == 1
    assert value(metrics, names.WORKERS, role="decode", state="draining") == 1
    assert value(metrics, names.WORKERS, role="prefill", state="ready") == 0
