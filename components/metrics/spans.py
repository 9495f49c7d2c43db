# SPDX-License-Identifier: Apache-2.0
"""OpenTelemetry spans of moves, in the trace of the moved request.

Dynamo's frontend and workers write the spans of a request. A move adds ``live_migration`` (begin to end at the
source), with ``frozen`` in it, the time without a token. Off unless ``OTEL_EXPORTER_OTLP_ENDPOINT`` (or
``..._TRACES_ENDPOINT``) is set and the extra ``otel`` is installed. The source writes the spans after the move.
``export`` never raises and never waits: OpenTelemetry's thread sends.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from functools import cache
from typing import Any

from components import env
from components.migration.messages import MoveRecord

logger = logging.getLogger(__name__)


def record(move: MoveRecord, ended: float, tracer: Any, headers: Mapping[str, str]) -> None:
    """Write a move that ended at ``ended`` (local Unix time), in the trace of ``headers`` (W3C)."""
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    request = TraceContextTextMapPropagator().extract(headers)
    attributes = {
        "request.id": move.request_id,
        "live_migration.source": move.source,
        "live_migration.target": move.target,
        "live_migration.mode": move.mode.value,
        "live_migration.rounds": move.rounds,
        "live_migration.bytes": move.bytes,
        "live_migration.lane": move.lane,
    }
    span = tracer.start_span(
        "live_migration", context=request, start_time=_ns(ended - move.total_s), attributes=attributes
    )
    if not move.ok:
        span.set_status(trace.StatusCode.ERROR, f"{move.code}: {move.reason}")
    if move.downtime_s:
        inside = trace.set_span_in_context(span)
        frozen = tracer.start_span("frozen", context=inside, start_time=_ns(ended - move.downtime_s))
        frozen.end(end_time=_ns(ended))
    span.end(end_time=_ns(ended))


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)


@cache
def _tracer() -> Any:
    if not (env.TRACES.read() or env.TRACES_ALONE.read()):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        logger.warning("no traces: %s; install the extra 'otel'", error)
        return None
    # A separate provider: Dynamo and vLLM have theirs in this process.
    provider = TracerProvider(resource=Resource.create({"service.name": "dynamo-migrate"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider.get_tracer("dynamo-migrate")


def export(move: MoveRecord, headers: Mapping[str, str]) -> None:
    """Write a move that has just ended, if traces are on. ``headers``: those of its request."""
    tracer = _tracer()
    if tracer is not None:
        record(move, time.time(), tracer, headers)
