# SPDX-License-Identifier: Apache-2.0
"""What is simulated, each on the same requests under Dynamo's KV routing.

steady      rates that workers can serve, with all of an H200's memory and with little KV: with and without policies;
            on several samples of a trace, with little KV also with moves that cost nothing
cases       loads that are made to have one trouble each (cases.py): the same
restart     all workers are restarted, a tenth at a time: their requests move, are awaited, or are replayed by Dynamo
swing       the rate swings, and a planner follows it: worker-hours and p99 TTFT over a range of its thresholds; also
            with moves that cost nothing
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.policy.cases import LOAD
from planner_hooks.config import PolicyFile, parse
from planner_hooks.config import load as load_policies
from planner_hooks.simulate.model import Slo, WorkerModel
from planner_hooks.simulate.report import Report
from planner_hooks.simulate.scaling import Scaling
from planner_hooks.simulate.scenario import WARM_UP, Scenario, simulate
from planner_hooks.simulate.traces import Arrival
from planner_hooks.simulate.upkeep import Ending

WHOLE, LITTLE = WorkerModel().capacity_tokens, 98_304
"""KV of a worker: all of an H200's memory, and the 12 GiB of ``crowd-gpu.json``."""
FULL = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
"""KV usages above which the planner adds a worker; below three fifths of it one goes."""
SECONDS = {4: 400.0, 16: 150.0, 64: 60.0, 256: 40.0, 1024: 20.0}
LOADS = (0.4, 0.55, 0.7)
CASE_SECONDS = 200.0
SLO = Slo(ttft_s=2.0, tpot_s=0.05)
FREE = "free moves"
VARIANTS = ("KV routing", "and policies", FREE)
"""Of steady load and cases."""
SEED = 5001
"""The first one. The policies' defaults were chosen with smaller ones."""


class Result(msgspec.Struct, frozen=True):
    """One run."""

    group: str
    scenario: Scenario
    variant: str
    report: Report
    full: float | None = None


class Bound(msgspec.Struct, frozen=True):
    """What no placement can beat: the same requests, each alone on a worker that knows its prefix."""

    scenario: Scenario
    ttft_p99_ms: float
    tpot_p99_ms: float


def bound(scenario: Scenario, arrivals: list[Arrival]) -> Bound:
    """See ``Bound``. Every cache knows what came before."""
    model, seen = scenario.model, set[int]()
    step, first, tpot = model.step, [], []
    for arrival in arrivals:
        known = next((n for n, block in enumerate(arrival.prefix) if block not in seen), len(arrival.prefix))
        seen.update(arrival.prefix)
        if arrival.time_s < WARM_UP * scenario.seconds:
            continue
        left = max(1, arrival.prompt_tokens - known * model.prefix_block_tokens)
        chunks = math.ceil(left / model.chunk_tokens)
        compute = max(step.prompt_s, step.per_prefill_token_s * min(left, model.chunk_tokens))
        first.append(chunks * step.base_s + max(compute, step.per_prefill_token_s * left))
        kv = arrival.prompt_tokens + arrival.output_tokens / 2
        tpot.append(step.base_s + step.per_seq_s + step.per_kv_token_s * kv)
    p99 = [1e3 * float(np.percentile(values, 99, method="higher")) for values in (first, tpot)]
    return Bound(scenario, *p99)


def scenarios(traces: list[str], sizes: list[int], samples: int = 6) -> dict[str, list[Scenario]]:
    """By group. Large clusters are simulated for a shorter time, and at one load.

    A p99 of one sample of a trace differs from that of another by 10 to 30%.
    """
    seeds = range(SEED, SEED + samples)
    found: dict[str, list[Scenario]] = {"steady": [], "cases": [], "restart": [], "swing": []}
    for name, load in LOAD.items():
        for workers in set(sizes) & {4, 16}:
            found["cases"] += [Scenario(name, workers, load, CASE_SECONDS, LITTLE, seed=seed) for seed in seeds]
    for trace in traces:
        for workers in sizes:
            seconds = SECONDS.get(workers, 300.0)
            for load in LOADS if workers <= 16 else LOADS[1:2]:
                for kv in (WHOLE, LITTLE):
                    some = seeds if workers <= 256 else seeds[:1]
                    found["steady"] += [Scenario(trace, workers, load, seconds, kv, seed=seed) for seed in some]
            if workers <= 16:
                found["restart"] += [Scenario(trace, workers, LOADS[0], 800.0, restarts=True, seed=s) for s in seeds]
            if workers == 16:
                found["swing"] += [Scenario(trace, workers, 0.7, 900.0, LITTLE, swings=True, seed=s) for s in seeds]
    return found


def variants(group: str, scenario: Scenario, arrivals: list[Arrival], policies: Path) -> Iterator[Result]:
    """All runs of one scenario."""
    file = load_policies(policies)
    if group in ("steady", "cases"):
        yield Result(group, scenario, VARIANTS[0], simulate(scenario, arrivals, slo=SLO))
        yield Result(group, scenario, VARIANTS[1], simulate(scenario, arrivals, file, slo=SLO))
        if scenario.kv_tokens == LITTLE and scenario.workers <= 16:
            report = simulate(
                scenario, arrivals, eager({"defragment": {}, "balance": EAGER}), slo=SLO, model=free(scenario)
            )
            yield Result(group, scenario, FREE, report)
    elif group == "restart":
        for ending in (Ending.WAIT, Ending.REPLAY):
            yield Result(group, scenario, ending, simulate(scenario, arrivals, ending=ending, slo=SLO))
        yield Result(group, scenario, "move", simulate(scenario, arrivals, file, slo=SLO))
    else:
        for full in FULL:
            scaling = Scaling(0.6 * full, full, min_workers=2, max_workers=scenario.workers)
            waits = simulate(scenario, arrivals, ending=Ending.WAIT, scaling=scaling, slo=SLO)
            yield Result(group, scenario, "wait", waits, full)
            report = simulate(scenario, arrivals, fuller(), scaling=scaling, slo=SLO)
            yield Result(group, scenario, "move", report, full)
            best = eager(FULLER | {"balance": EAGER}, FULLER_RULES)
            report = simulate(scenario, arrivals, best, scaling=scaling, slo=SLO, model=free(scenario))
            yield Result(group, scenario, FREE, report, full)


EAGER = {"high": 0.0, "start-gap": 0.02, "stop-gap": 0.01}
FULLER_RULES = {"delay-s": 0, "reserve": 0.0, "max-usage": 0.85}
FULLER: dict[str, dict[str, float]] = {"consolidate": {"reserve": 0.0}, "defragment": {}, "balance": {}}


def fuller() -> PolicyFile:
    """Policies of a planner that lets workers be fuller, with nothing in reserve."""
    return parse({"interval-s": 1, "scale-down": FULLER_RULES, "policies": FULLER})


def eager(policies: dict[str, dict[str, float]], scale_down: dict[str, float] | None = None) -> PolicyFile:
    """Policies that move whatever evens out loads, four times a second: for moves that cost nothing."""
    limits = {"cooldown-s": 0, "no-return-s": 0, "max-destination-usage": 0.98}
    limits |= {"max-moves-per-worker": 256, "max-moves-per-pair": 256}
    rules = {"scale-down": scale_down} if scale_down else {}
    return parse({"interval-s": 0.25, "limits": limits, "cost": {"min-gain": 0}, "policies": policies} | rules)


def free(scenario: Scenario) -> WorkerModel:
    """Moves that take no time and disturb nobody."""
    costs = dict.fromkeys(("overhead_s", "downtime_s", "commit_s", "crowd_pause_s", "interference"), 0.0)
    return msgspec.structs.replace(scenario.model, free_moves=True, bytes_per_s=1e18, **costs)


def ending(results: list[Result]) -> float:
    """Share of all worker-hours in which a worker only awaits the ends of its requests; the median over thresholds."""
    return float(np.median([r.report.ending_share for r in results if r.variant == "wait"]))


def saved(results: list[Result], variant: str = "move") -> float:
    """Share of worker-hours that moves save against the cheapest cluster that awaits ends and is as fast.

    The median over all thresholds of one scenario: the best one would be that at which the other is unlucky.
    """
    waits = [r.report for r in results if r.variant == "wait"]
    found = []
    for ours in (r.report for r in results if r.variant == variant):
        rivals = [w.worker_hours for w in waits if w.ttft_p99_ms <= ours.ttft_p99_ms]
        found += [1.0 - ours.worker_hours / min(rivals)] if rivals else []
    return float(np.median(found)) if found else math.nan
