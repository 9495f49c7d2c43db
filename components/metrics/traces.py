# SPDX-License-Identifier: Apache-2.0
"""One OpenTelemetry trace for each request: router, prefill, every copy between workers, every decode worker.

Off unless ``OTEL_EXPORTER_OTLP_ENDPOINT`` (or ``..._TRACES_ENDPOINT``) is set and the extra ``otel`` is installed. A
trace is written when its request has ended, from the events that the router noted: nothing is done while tokens flow.
``export`` never raises and never waits: OpenTelemetry's own thread sends.

A client's W3C ``traceparent`` is continued where Dynamo's frontend hands it on, see docs/operations.md; a client that
asks for no trace in it gets none.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from components import env
from components.messages import EventKind, StreamEvent, StreamInfo

logger = logging.getLogger(__name__)
_OWNS = {EventKind.DECODE, EventKind.SWITCHED, EventKind.STAYS, EventKind.REPLAYED}


@dataclass(frozen=True)
class Span:
    """One part of a request's life. Unix times."""

    name: str
    worker: str
    began: float
    ended: float


def spans(events: tuple[StreamEvent, ...]) -> Iterator[Span]:
    """The parts that the events tell of; one that is not over ends with the last event."""
    if not events:
        return
    owner: tuple[str, StreamEvent] | None = None
    copying: StreamEvent | None = None
    for event in events:
        if event.kind is EventKind.COPYING or (event.kind is EventKind.FROZEN and copying is None):
            copying = event
        elif event.kind in (*_OWNS, EventKind.PREFILL, EventKind.ENDED):
            if copying is not None:
                yield Span("transfer", event.worker or copying.worker, copying.at, event.at)
                copying = None
            if owner is not None:
                yield Span(owner[0], owner[1].worker, owner[1].at, event.at)
            name = "prefill" if event.kind is EventKind.PREFILL else "decode"
            owner = None if event.kind is EventKind.ENDED else (name, event)
    if owner is not None:
        yield Span(owner[0], owner[1].worker, owner[1].at, events[-1].at)


def record(info: StreamInfo, tracer: Any, headers: Mapping[str, str] | None = None) -> None:
    """Write the trace of a request that has ended, as a part of the one that ``headers`` (W3C) name."""
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    if not info.events:
        return
    caller = TraceContextTextMapPropagator().extract(headers or {})
    attributes = {
        "request.id": info.request_id,
        "gen_ai.usage.input_tokens": info.prompt_tokens,
        "gen_ai.usage.output_tokens": info.output_tokens,
        "live_migration.moves": info.moves,
        "live_migration.replays": info.replays,
    }
    root = tracer.start_span(
        "request", context=caller, start_time=_ns(info.events[0].at), attributes=attributes, kind=trace.SpanKind.SERVER
    )
    parent = trace.set_span_in_context(root)
    for span in spans(info.events):
        child = tracer.start_span(
            span.name, context=parent, start_time=_ns(span.began), attributes={"dynamo.worker": span.worker}
        )
        child.end(end_time=_ns(span.ended))
    root.end(end_time=_ns(info.events[-1].at))


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
    provider = TracerProvider(resource=Resource.create({"service.name": "dynamo-migrate-router"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider.get_tracer("dynamo-migrate")


def export(info: StreamInfo, context: Any) -> None:
    """Write the trace of a request that has ended, where traces are switched on. ``context``: Dynamo's, of its call."""
    tracer = _tracer()
    if tracer is not None:
        record(info, tracer, context.trace_headers())
