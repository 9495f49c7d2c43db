# SPDX-License-Identifier: Apache-2.0
"""Names of all metrics of this package. Plain values.

Dynamo's prefix for components is ``dynamo_component``; this package's is ``dynamo_component_live_migration``,
because Dynamo's ``model_migration`` means a retry after a failure. Dynamo adds the labels ``dynamo_namespace``,
``dynamo_component``, ``dynamo_endpoint`` and ``worker_id``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

PREFIX = "dynamo_component_live_migration"
_SHORT = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0)
_TINY = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 2.0)
_LONG = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 120.0, 300.0)


class Kind(StrEnum):
    """Prometheus' types."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True)
class Metric:
    """One metric. ``name`` is without the prefix and without ``_total``."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def full_name(self) -> str:
        """Name in Prometheus; a histogram's series end in ``_bucket``, ``_sum`` and ``_count``."""
        return f"{PREFIX}_{self.name}" + ("_total" if self.kind is Kind.COUNTER else "")


# Of the source of a migration.
MOVES = Metric("moves", Kind.COUNTER, "Migrations that ended, by mode and outcome (done, failed)", ("mode", "outcome"))
REFUSALS = Metric("refusals", Kind.COUNTER, "Migrations that were refused before anything changed", ("reason",))
FALLBACKS = Metric("fallbacks", Kind.COUNTER, "Migrations that went on in a simpler mode", ("mode", "reason"))
DOWNTIME = Metric(
    "downtime_seconds", Kind.HISTOGRAM, "Last token from the source to first from the target", ("mode",), _SHORT
)
STALL = Metric("stall_seconds", Kind.HISTOGRAM, "Downtime less the usual gap between tokens", ("mode",), _SHORT)
DURATION = Metric("duration_seconds", Kind.HISTOGRAM, "Whole migration, pre-copy included", ("mode",), _LONG)
ROUNDS = Metric("rounds", Kind.HISTOGRAM, "Rounds of copying of one migration", ("mode",), (1, 2, 3, 4, 5, 6, 8, 12))
BYTES = Metric("bytes", Kind.COUNTER, "KV bytes that migrations moved", ("mode", "lane"))
DESCRIPTORS = Metric("descriptors", Kind.COUNTER, "Memory ranges that were posted", ("lane",))
POST = Metric("post_seconds", Kind.HISTOGRAM, "Time of one migration spent in posting transfers", ("lane",), _TINY)
WIRE = Metric("wire_seconds", Kind.HISTOGRAM, "Time of one migration spent waiting for bytes", ("lane",), _SHORT)
INTEGRITY = Metric("integrity_failures", Kind.COUNTER, "Migrations whose bytes were wrong and were recomputed")
DRAINS = Metric("drains", Kind.COUNTER, "Drains of a worker, by outcome (done, failed)", ("outcome",))
DRAIN = Metric("drain_seconds", Kind.HISTOGRAM, "Time to empty a worker", (), _LONG)

# Of a worker.
RELAYS = Metric(
    "relays", Kind.GAUGE, "Requests whose tokens this worker passes on from the one that they have moved to"
)
REPEATS = Metric("repeats", Kind.COUNTER, "Moved requests that the frontend was asked to send again")
ADOPTIONS = Metric(
    "adoptions", Kind.COUNTER, "Repeats of moved requests that nobody computed again (here, relayed)", ("how",)
)
RECOMPUTED = Metric("recomputed", Kind.COUNTER, "Moved requests computed again here because their worker was lost")
LANDINGS = Metric("landings", Kind.COUNTER, "Requests from other workers, by outcome (done, failed)", ("outcome",))
ORPHANS = Metric("orphans", Kind.COUNTER, "Moved requests given up because nobody asked for their tokens")
HANDOFFS = Metric("handoffs", Kind.COUNTER, "Hand-offs from prefill to decode, by outcome", ("outcome",))
CORDONED = Metric("cordoned", Kind.GAUGE, "1 while this worker takes nothing new")
KV_BLOCKS = Metric("kv_blocks", Kind.GAUGE, "KV blocks of this worker (used, free)", ("state",))
REQUESTS = Metric("requests", Kind.GAUGE, "Requests on this worker (running, waiting, frozen, landing)", ("phase",))
STEP = Metric("step_seconds", Kind.GAUGE, "Duration of the engine's last step")
PREEMPTIONS = Metric("preemptions", Kind.COUNTER, "Requests that lost their blocks to others")
LEASES = Metric("leases_expired", Kind.COUNTER, "Requests ended here because their owner was silent too long")
KV_REFUSED = Metric(
    "kv_refused", Kind.COUNTER, "Copies whose KV blocks were not used but computed again, by error code", ("reason",)
)

WORKER = tuple(each for each in list(globals().values()) if isinstance(each, Metric))
