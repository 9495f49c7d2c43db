# SPDX-License-Identifier: Apache-2.0
"""Worker-hours at equal P99 TTFT: the need of a cluster without migration to be as fast as one with it.

The comparison behind Llumnix's "36% cost saving" (OSDI'24, abstract): both sides serve the same requests; the one
without migration may have more workers, or a planner that keeps them emptier, until its P99 is as low.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import msgspec

from benchmarks.policy.runs import WARM_UP, Case, Result
from planner_hooks.simulate.cluster import Cluster
from planner_hooks.simulate.dispatch import Dispatch
from planner_hooks.simulate.model import Slo, WorkerModel
from planner_hooks.simulate.report import report
from planner_hooks.simulate.scaling import Scaling
from planner_hooks.simulate.traces import Arrival

_SHARES = tuple(n / 8 for n in range(6, 17))
"""Numbers of workers that are tried, of those that the load is made for."""
_FULL = (0.85, 0.75, 0.65, 0.55, 0.45, 0.35, 0.25)
"""KV usages above which the planner adds a worker; below three fifths of it one goes."""
_LOW = 0.6


class Point(msgspec.Struct, frozen=True):
    """One cluster without migration."""

    case: Case
    kv_routing: bool
    full: float | None
    """None: the number of workers stays as it is."""
    workers: int
    """The most there may be."""
    worker_hours: float
    ttft_p99_ms: float


class Price(msgspec.Struct, frozen=True):
    """A variant with migration, and the cheapest cluster without any whose P99 is as low."""

    result: Result
    point: Point | None
    """None: none of those tried was as fast."""

    @property
    def saved(self) -> float:
        """Share of that cluster's worker-hours."""
        return 1.0 - self.result.report.worker_hours / self.point.worker_hours if self.point is not None else math.nan


def sweep(
    case: Case, arrivals: list[Arrival], model: WorkerModel, fastest_ms: float, say: Callable[[str], None]
) -> Iterator[Point]:
    """Clusters without migration, cheap ones first, until one has a P99 of at most ``fastest_ms``."""
    counts = sorted({math.ceil(share * case.workers) for share in _SHARES})
    most = counts[-1]
    for kv_routing in (False, True):
        dispatch = Dispatch.KV if kv_routing else Dispatch.ROUND_ROBIN
        fixed: list[tuple[int, Scaling | None]] = [(count, None) for count in counts]
        scaled = [(most, Scaling(_LOW * full, full, max_workers=most)) for full in _FULL]
        for series in (fixed, scaled):
            for workers, planner in series:
                say(f"{workers} workers" if planner is None else f"usage up to {planner.high:.0%}")
                cluster = Cluster(model, workers if planner is None else case.workers, dispatch, scaling=planner)
                cluster.run(arrivals)
                found = report(cluster, len(arrivals), Slo(), WARM_UP * case.duration_s)
                full = planner.high if planner is not None else None
                yield Point(case, kv_routing, full, workers, found.worker_hours, found.ttft_p99_ms)
                if found.ttft_p99_ms <= fastest_ms:
                    break


def prices(results: list[Result], points: list[Point]) -> list[Price]:
    """One for each scaled variant with policies; against clusters with KV routing where the variant has it."""
    found, tried = [], {point.case for point in points}
    for result in results:
        if not (result.variant.scaling and result.variant.policies) or result.case not in tried:
            continue
        as_fast = [
            p
            for p in points
            if p.case == result.case
            and p.kv_routing == result.variant.kv_routing
            and p.ttft_p99_ms <= result.report.ttft_p99_ms
        ]
        found.append(Price(result, min(as_fast, key=lambda p: p.worker_hours, default=None)))
    return found
