# SPDX-License-Identifier: Apache-2.0
"""Figures of a simulated run. Requests that never finished count as infinitely late."""

from __future__ import annotations

import math

import msgspec
import numpy as np

from planner_hooks.simulate.cluster import Cluster
from planner_hooks.simulate.model import Slo


class Report(msgspec.Struct, frozen=True):
    """One run. Times in milliseconds; ``goodput`` is the share of requests that met both SLOs.

    Of requests of the highest priority: the others are their neighbours.
    """

    requests: int
    unfinished: int
    ttft_p50_ms: float
    ttft_p99_ms: float
    tpot_p50_ms: float
    tpot_p99_ms: float
    stall_p99_ms: float
    """Time without a token, by preemption, migration or replay."""
    ended_stall_p99_ms: float
    """The same of requests whose worker ended."""
    ended_tpot_p99_ms: float
    emptying_s: float
    """Median time that an ending worker took to be empty."""
    goodput: float
    preemptions: int
    migrations: int
    failed_migrations: int
    gb_moved: float
    worker_hours: float
    ending_share: float
    """Share of the worker-hours in which a worker only gets empty."""
    decision_ms: float


def _at(values: np.ndarray, percent: float) -> float:
    return 1e3 * float(np.percentile(values, percent, method="higher")) if len(values) else 0.0


def report(cluster: Cluster, arrivals: int, slo: Slo, warmup_s: float = 0.0) -> Report:
    """Results of a run, without requests of the warm-up."""
    highest = max((r.arrival.priority for r in cluster.finished), default=0)
    done = [r for r in cluster.finished if r.arrival.time_s >= warmup_s and r.arrival.priority == highest]
    missing = arrivals - cluster.rejected - len(cluster.finished)
    ttft = np.array([r.first_s - r.arrival.time_s for r in done] + [math.inf] * missing)
    tpot = np.array([r.tpot_s for r in done if r.arrival.output_tokens > 1])
    good = sum(r.first_s - r.arrival.time_s <= slo.ttft_s and r.tpot_s <= slo.tpot_s for r in done)
    stall = np.array([r.stall_s for r in done])
    ended = [r for r in done if r.ended]
    gone = [w.gone_s - w.ending_s for w in cluster.all_workers if w.ending_s < w.gone_s < cluster.time_s]
    return Report(
        requests=len(done),
        unfinished=missing,
        ttft_p50_ms=_at(ttft, 50),
        ttft_p99_ms=_at(ttft, 99),
        tpot_p50_ms=_at(tpot, 50),
        tpot_p99_ms=_at(tpot, 99),
        stall_p99_ms=_at(stall, 99),
        ended_stall_p99_ms=_at(np.array([r.stall_s for r in ended]), 99),
        ended_tpot_p99_ms=_at(np.array([r.tpot_s for r in ended]), 99),
        emptying_s=float(np.median(gone)) if gone else 0.0,
        goodput=good / max(1, len(done) + missing),
        preemptions=sum(w.preemptions for w in cluster.all_workers),
        migrations=cluster.moves.by_policy.total(),
        failed_migrations=cluster.moves.failed,
        gb_moved=cluster.moves.bytes_moved / 1e9,
        worker_hours=cluster.worker_hours(),
        ending_share=sum(gone) / 3600 / cluster.worker_hours() if cluster.time_s else 0.0,
        decision_ms=1e3 * float(np.median(cluster.decision_s)) if cluster.decision_s else 0.0,
    )
