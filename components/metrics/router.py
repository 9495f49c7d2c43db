# SPDX-License-Identifier: Apache-2.0
"""What the router counts. All methods are called on the router's loop and never raise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.registry import Collector

from components.errors import (
    DeadlineExceeded,
    IntegrityError,
    NoRoom,
    NotMigratable,
    Refused,
    TransferError,
    WorkerLost,
)
from components.messages import Mode, MoveRecord
from components.metrics import names
from components.metrics.export import Family, counter, family, histogram

if TYPE_CHECKING:
    from components.router.stream import Stream
    from components.router.workers import Worker

_REFUSED = (NoRoom.code, NotMigratable.code, Refused.code)


class RouterMetrics:
    """See the module docstring. ``registry`` is what is exported."""

    def __init__(self, streams: Callable[[], Collection[Stream]], workers: Callable[[], Collection[Worker]]) -> None:
        self.registry = registry = CollectorRegistry()
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
        self._handoffs = counter(names.HANDOFFS, registry)
        self._handoff = histogram(names.HANDOFF, registry)
        self._local = counter(names.LOCAL_PREFILLS, registry)
        self._replays = counter(names.REPLAYS, registry)
        self._drains = counter(names.DRAINS, registry)
        self._drain = histogram(names.DRAIN, registry)
        registry.register(_Now(streams, workers))
        # Alerts and panels need series from the start, not from the first event on.
        for mode in Mode:
            for outcome in ("done", "failed"):
                self._moves.labels(mode, outcome)
            self._downtime.labels(mode)
            self._stall.labels(mode)
        for outcome in ("done", "failed"):
            self._handoffs.labels(outcome)
            self._drains.labels(outcome)
        for reason in ("no_worker", "short", "not_migratable"):
            self._local.labels(reason)
        for code in _REFUSED:
            self._refusals.labels(code)
        for code in (TransferError.code, DeadlineExceeded.code):
            self._fallbacks.labels(Mode.LIVE, code)
        for code in (WorkerLost.code, DeadlineExceeded.code):
            self._replays.labels(code)

    def moved(self, record: MoveRecord) -> None:
        """A migration has ended."""
        mode, lane = record.mode.value, record.lane or "none"
        code = record.reason.partition(":")[0] if ":" in record.reason else "other"
        self._moves.labels(mode, "done" if record.ok else "failed").inc()
        if code == IntegrityError.code:
            self._integrity.inc()
        if not record.ok:
            if code in _REFUSED:
                self._refusals.labels(code).inc()
            return
        self._downtime.labels(mode).observe(record.downtime_s)
        self._stall.labels(mode).observe(record.added_stall_s)
        self._duration.labels(mode).observe(record.total_s)
        if record.mode is Mode.REPLAY:
            return
        self._rounds.labels(mode).observe(record.rounds)
        self._bytes.labels(mode, lane).inc(record.bytes)
        self._descriptors.labels(lane).inc(record.descriptors)
        self._post.labels(lane).observe(record.post_s)
        self._wire.labels(lane).observe(record.wire_s)

    def fell_back(self, mode: Mode, reason: str) -> None:
        """A migration goes on in a simpler mode; ``mode`` is the one that failed."""
        self._fallbacks.labels(mode.value, reason.partition(":")[0] if ":" in reason else "other").inc()

    def handed_off(self, seconds: float, done: bool) -> None:
        """A hand-off from prefill to decode has ended."""
        self._handoffs.labels("done" if done else "failed").inc()
        if done:
            self._handoff.observe(seconds)

    def prefilled_locally(self, reason: str) -> None:
        """A prompt goes to a decode worker at once."""
        self._local.labels(reason).inc()

    def replayed(self, reason: str) -> None:
        """A request is replayed after the loss of its worker."""
        self._replays.labels(reason).inc()

    def drained(self, seconds: float, done: bool) -> None:
        """A drain has ended."""
        self._drains.labels("done" if done else "failed").inc()
        if done:
            self._drain.observe(seconds)


class _Now(Collector):
    """Gauges that are read when somebody scrapes, on Dynamo's thread."""

    def __init__(self, streams: Callable[[], Collection[Stream]], workers: Callable[[], Collection[Worker]]) -> None:
        self._streams = streams
        self._workers = workers

    def collect(self) -> Iterator[Family]:
        """All of them."""
        streams = list(self._streams())
        moving = sum(stream.lock.locked() for stream in streams)
        yield family(names.STREAMS, {("running",): len(streams) - moving, ("moving",): moving})
        workers: Counter[tuple[str, ...]] = Counter(
            (w.role, "ready" if w.available else "draining") for w in list(self._workers())
        )
        every: dict[tuple[str, ...], float] = {
            (role, state): 0.0 for role in ("prefill", "decode") for state in ("ready", "draining")
        }
        yield family(names.WORKERS, {**every, **workers})
