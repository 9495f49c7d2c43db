# SPDX-License-Identifier: Apache-2.0
"""Metrics of a worker: moves from it, relays, arrivals, and the last known state of its engine.

Events are counted on the worker's loop. Dynamo's thread reads gauges at a scrape, without waiting for the engine:
``Gauges.stats`` is its last report, and ``wake`` requests a new one for the next scrape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.registry import Collector

from components.engine.protocol import EngineStats
from components.errors import (
    DeadlineExceeded,
    IncompatibleLayout,
    IntegrityError,
    NoRoom,
    NotMigratable,
    Refused,
    StaleEpoch,
    TransferError,
)
from components.metrics import names
from components.metrics.export import Family, Registry, counter, family, histogram
from components.migration.events import Event
from components.migration.messages import Mode, MoveRecord

_REFUSED = (NoRoom.code, NotMigratable.code, Refused.code)
_COUNTED: dict[names.Metric, dict[tuple[str, ...], Event]] = {
    names.REPEATS: {(): Event.REPEATED},
    names.ADOPTIONS: {("here",): Event.ADOPTED, ("relayed",): Event.PASSED_ON},
    names.RECOMPUTED: {(): Event.RECOMPUTED},
    names.LANDINGS: {("done",): Event.LANDED, ("failed",): Event.NOT_LANDED},
    names.ORPHANS: {(): Event.ORPHANED},
}
"""Metrics and their counts, by labels."""
_HANDOFFS = ("lent", "lease_over", "first_token_used")
"""Outcomes with series from the start."""


@dataclass(frozen=True)
class Gauges:
    """A worker at one moment."""

    stats: EngineStats | None = None
    relays: int = 0
    cordoned: bool = False
    events: Mapping[Event, int] = field(default_factory=dict)
    handoffs: Mapping[str, int] = field(default_factory=dict)


class WorkerMetrics(Collector):
    """See the module docstring. ``registry`` is exported."""

    def __init__(self, gauges: Callable[[], Gauges], wake: Callable[[], None]) -> None:
        self._gauges = gauges
        self._wake = wake
        self.registry = registry = Registry()
        self._moves = counter(names.MOVES, registry)
        self._refusals = counter(names.REFUSALS, registry)
        self._fallbacks = counter(names.FALLBACKS, registry)
        self._downtime = histogram(names.DOWNTIME, registry)
        self._stall = histogram(names.STALL, registry)
        self._duration = histogram(names.DURATION, registry)
        self._rounds = histogram(names.ROUNDS, registry)
        self._bytes = counter(names.BYTES, registry)
        self._descriptors = counter(names.DESCRIPTORS, registry)
        self._post = histogram(names.POST, registry)
        self._wire = histogram(names.WIRE, registry)
        self._integrity = counter(names.INTEGRITY, registry)
        self._drains = counter(names.DRAINS, registry)
        self._drain = histogram(names.DRAIN, registry)
        registry.register(self)
        # Alerts and panels need series before the first event.
        for mode in Mode:
            for outcome in ("done", "failed"):
                self._moves.labels(mode, outcome)
            self._downtime.labels(mode)
            self._stall.labels(mode)
        for outcome in ("done", "failed"):
            self._drains.labels(outcome)
        for code in _REFUSED:
            self._refusals.labels(code)
        for code in (TransferError.code, DeadlineExceeded.code):
            self._fallbacks.labels(Mode.LIVE, code)

    def moved(self, record: MoveRecord, asked: Mode) -> None:
        """Count an ended migration; ``asked`` is the requested mode."""
        mode, lane = record.mode.value, record.lane or "none"
        self._moves.labels(mode, "done" if record.ok else "failed").inc()
        if record.code == IntegrityError.code:
            self._integrity.inc()
        if not record.ok:
            if record.code in _REFUSED:
                self._refusals.labels(record.code).inc()
            return
        if record.mode is not asked:
            self._fallbacks.labels(asked.value, record.code or "other").inc()
        self._duration.labels(mode).observe(record.total_s)
        self._downtime.labels(mode).observe(record.downtime_s)
        self._stall.labels(mode).observe(record.added_stall_s)
        if record.mode is Mode.REPLAY:
            return
        self._rounds.labels(mode).observe(record.rounds)
        self._bytes.labels(mode, lane).inc(record.bytes)
        self._descriptors.labels(lane).inc(record.descriptors)
        self._post.labels(lane).observe(record.post_s)
        self._wire.labels(lane).observe(record.wire_s)

    def drained(self, seconds: float, done: bool) -> None:
        """Count an ended drain."""
        self._drains.labels("done" if done else "failed").inc()
        if done:
            self._drain.observe(seconds)

    def collect(self) -> Iterator[Family]:
        """All gauges."""
        self._wake()
        now = self._gauges()
        yield family(names.RELAYS, {(): now.relays})
        yield family(names.CORDONED, {(): now.cordoned})
        for metric, series in _COUNTED.items():
            yield family(metric, {labels: now.events.get(event, 0) for labels, event in series.items()})
        handed = dict.fromkeys(_HANDOFFS, 0) | dict(now.handoffs)
        yield family(names.HANDOFFS, {(outcome,): count for outcome, count in handed.items()})
        stats = now.stats
        if stats is None:
            return
        yield family(names.KV_BLOCKS, {("used",): stats.total_blocks - stats.free_blocks, ("free",): stats.free_blocks})
        phases = ("running", "waiting", "frozen", "landing")
        yield family(names.REQUESTS, {(phase,): getattr(stats, phase) for phase in phases})
        yield family(names.STEP, {(): stats.step_s})
        yield family(names.PREEMPTIONS, {(): stats.preemptions_total})
        yield family(names.LEASES, {(): stats.leases_expired_total})
        # Alerts need series before the first event.
        refused = dict.fromkeys((IntegrityError.code, StaleEpoch.code, IncompatibleLayout.code), 0) | stats.kv_refused
        yield family(names.KV_REFUSED, {(code,): count for code, count in refused.items()})
