# SPDX-License-Identifier: Apache-2.0
"""What the router and the connector cost, as a part of the report."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.stats import bootstrap

from benchmarks.serving.metrics import Run, Slo, figures, four, throughput
from benchmarks.serving.overhead import Cost, Hop
from benchmarks.serving.parts import TITLES, Kind
from benchmarks.serving.tables import table

_KINDS = (Kind.OURS_AGG, Kind.STOCK_AGG)


def overhead(title: str, where: str, runs: list[Run], costs: list[Cost], hop: Hop, slo: Slo) -> list[str]:
    """Lines of the section; none without runs."""
    if not runs:
        return []
    rows = [_row(at_once, runs, slo) for at_once in sorted({run.at_once for run in runs})]
    header = ["at once", "throughput with / without", "p99 TTFT with / without", "throughput, repeats"]
    header += ["p99 TTFT, repeats", "requests", "tokens/s", "TTFT p50 ms", "TTFT p99 ms", "ITL p50 ms"]
    return [
        f"## Router and connector without migrations: {title}",
        "",
        f"{where}. With: {TITLES[Kind.OURS_AGG]}. Without: {TITLES[Kind.STOCK_AGG]}. Both up at once, runs in turn. "
        "Goal: throughput at least 0.98, p99 TTFT at most 1.05. The first two columns: all repeats pooled, 95% "
        "intervals in brackets (bootstrap over whole repeats). Then the median of the repeats' own ratios, lowest to "
        "highest in brackets: one repeat is so few requests that its p99 is nearly its slowest one.",
        "",
        *table(header, rows),
        *_costs(costs),
        *_hop(hop),
    ]


def _row(at_once: int, runs: list[Run], slo: Slo) -> list[str]:
    pairs = []
    for repeat in sorted({run.repeat for run in runs}):
        pair = [
            run for kind in _KINDS for run in runs if (run.system, run.repeat, run.at_once) == (kind, repeat, at_once)
        ]
        if len(pair) == len(_KINDS):
            pairs.append(pair)
    with_, without = (figures([pair[which] for pair in pairs], slo) for which in range(len(_KINDS)))
    return [
        str(at_once),
        _pooled(pairs, throughput, 3),
        _pooled(pairs, _late, 2),
        _each(pairs, throughput, 3),
        _each(pairs, _late, 2),
        str(with_.requests),
        f"{with_.tokens_s:.0f} / {without.tokens_s:.0f}",
        f"{with_.ttft[1]:.0f} / {without.ttft[1]:.0f}",
        f"{with_.ttft[2]:.0f} / {without.ttft[2]:.0f}",
        f"{with_.itl[1]:.1f} / {without.itl[1]:.1f}",
    ]


def _late(runs: list[Run]) -> float:
    return four([s.ttft_s for run in runs for s in run.samples if not s.failed])[2]


def _ratio(pairs: list[list[Run]], of: Callable[[list[Run]], float]) -> float:
    return of([pair[0] for pair in pairs]) / of([pair[1] for pair in pairs])


def _each(pairs: list[list[Run]], of: Callable[[list[Run]], float], digits: int) -> str:
    ratios = [_ratio([pair], of) for pair in pairs]
    return f"{np.median(ratios):.{digits}f} ({min(ratios):.{digits}f} to {max(ratios):.{digits}f})"


def _pooled(pairs: list[list[Run]], of: Callable[[list[Run]], float], digits: int) -> str:
    ratio = f"{_ratio(pairs, of):.{digits}f}"
    if len(pairs) < 2:
        return ratio
    # Repeats are drawn, not requests: those of one run share its placement and its queue.
    found = bootstrap(
        (np.arange(len(pairs)),),
        lambda drawn: _ratio([pairs[int(i)] for i in drawn], of),
        vectorized=False,
        n_resamples=1000,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    interval = found.confidence_interval
    return f"{ratio} ({interval.low:.{digits}f} to {interval.high:.{digits}f})"


def _costs(costs: list[Cost]) -> list[str]:
    if not costs:
        return []
    parts = sorted({cost.process for cost in costs}, reverse=True)
    each = {kind: {cost.process: cost.us_per_token for cost in costs if cost.system == kind} for kind in _KINDS}
    rows = [
        [kind.value, *(f"{mine.get(part, 0.0):.0f}" for part in parts), f"{sum(mine.values()):.0f}"]
        for kind, mine in each.items()
    ]
    return ["Time on processors for each output token, in microseconds:", "", *table(["", *parts, "all"], rows)]


def _hop(hop: Hop) -> list[str]:
    if not hop.direct:
        return []
    ways = (hop.direct, hop.routed)
    first = [four([times[0] for times in way]) for way in ways]
    gaps = [four([b - a for times in way for a, b in zip(times, times[1:], strict=False)]) for way in ways]
    return [
        f"Router hop, the same {len(hop.direct)} requests one at a time to a worker directly and through "
        f"the router (difference of the percentiles): TTFT {first[1][1] - first[0][1]:+.2f} ms at p50, "
        f"{first[1][2] - first[0][2]:+.2f} at p99 (direct {first[0][1]:.1f} and {first[0][2]:.1f}); ITL "
        f"{gaps[1][1] - gaps[0][1]:+.2f} at p50, {gaps[1][2] - gaps[0][2]:+.2f} at p99 (direct {gaps[0][1]:.1f} "
        f"and {gaps[0][2]:.1f}).",
        "",
    ]
