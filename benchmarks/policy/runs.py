# SPDX-License-Identifier: Apache-2.0
"""What is simulated: clusters, loads and the variants that are compared on the same requests.

Loads
    even      equal lengths, smooth arrivals, round robin: nothing to gain, so nothing may be lost
    heavy     heavy-tailed lengths, Poisson arrivals, round robin
    sticky    as heavy, sessions pinned to workers, some of them far busier than others: the uneven case
    wave      as heavy, the rate swings between a quarter and the whole, twice: for worker-hours

``kv-routing`` is Dynamo's KV router: the fewest prompt tokens to compute plus active tokens it has sent there.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np

from planner_hooks.config import PolicyFile, parse
from planner_hooks.simulate.cluster import Cluster
from planner_hooks.simulate.dispatch import Dispatch
from planner_hooks.simulate.model import Slo, WorkerModel, saturation_rate
from planner_hooks.simulate.report import Report, report
from planner_hooks.simulate.scaling import Scaling
from planner_hooks.simulate.traces import Arrival, Shape, synthetic

EACH = ("balance", "defragment", "priority")
"""Policies that a steady load can use; consolidate needs a number of workers that changes."""


WARM_UP = 0.2
"""Share of a run whose requests are left out of the figures."""
_FULLER = (0.6, 0.85)
"""Mean KV usage at which the planner takes a worker away and adds one."""
_SESSIONS = 32
"""For each worker."""


class Variant(msgspec.Struct, frozen=True):
    """One way to run the cluster. ``policies`` empty means that nothing moves."""

    name: str
    policies: tuple[str, ...] = ()
    kv_routing: bool = False
    scaling: bool = False
    fuller: bool = False
    """A planner that lets workers be fuller, and nothing in reserve."""

    def planner(self, max_workers: int) -> Scaling | None:
        """How many workers there should be; None keeps them all."""
        if not self.scaling:
            return None
        return Scaling(*(_FULLER if self.fuller else ()), max_workers=max_workers)

    def policy_file(self) -> PolicyFile | None:
        """The policies of the live system with their defaults, but for what follows from the time to start a worker."""
        if not self.policies:
            return None
        policies: dict[str, dict[str, float]] = {name: {} for name in self.policies}
        if not self.fuller:
            delay = {"delay-s": Scaling().startup_s / 2}
            return parse({"interval-s": 1, "scale-down": delay, "policies": policies})
        policies["consolidate"] = {"reserve": 0.0}
        return parse({"interval-s": 1, "scale-down": {"delay-s": 0, "reserve": 0.0}, "policies": policies})


STEADY = (
    Variant("no migration"),
    Variant("kv-routing", kv_routing=True),
    *(Variant(name, (name,)) for name in EACH),
    Variant("all", ("defragment", "priority", "balance")),
    Variant("all + kv-routing", ("defragment", "priority", "balance"), kv_routing=True),
)
_ALL = ("consolidate", "defragment", "priority", "balance")
WAVES = (
    Variant("no migration"),
    Variant("kv-routing", kv_routing=True),
    Variant("scaling only", scaling=True),
    Variant("scaling + consolidate", ("consolidate",), scaling=True),
    Variant("scaling + all", _ALL, scaling=True),
    Variant("scaling + all + kv-routing", _ALL, kv_routing=True, scaling=True),
    Variant("fuller only", scaling=True, fuller=True),
    Variant("fuller + all", _ALL, scaling=True, fuller=True),
    Variant("fuller + all + kv-routing", _ALL, kv_routing=True, scaling=True, fuller=True),
)


class Case(msgspec.Struct, frozen=True):
    """One cluster under one load; its variants get the same requests."""

    workers: int
    shape: Shape
    load: float
    """Share of the rate at which the cluster would be full."""
    duration_s: float
    seed: int = 1

    @property
    def variants(self) -> tuple[Variant, ...]:
        """What is compared."""
        return WAVES if self.shape is Shape.WAVE else STEADY


class Result(msgspec.Struct, frozen=True):
    """One run."""

    case: Case
    variant: Variant
    report: Report


def requests(case: Case, model: WorkerModel) -> list[Arrival]:
    """The requests of a case."""
    sample = synthetic(Shape.HEAVY if case.shape is Shape.WAVE else case.shape, 1000.0, 20.0)
    full = saturation_rate([a.prompt_tokens for a in sample], [a.output_tokens for a in sample], model)
    rate = full * case.workers * case.load
    return synthetic(case.shape, rate, case.duration_s, case.seed, sessions=_SESSIONS * case.workers)


def run(case: Case, variant: Variant, arrivals: list[Arrival], model: WorkerModel, slo: Slo) -> Result:
    """Simulate one variant."""
    own = Dispatch.STICKY if case.shape is Shape.STICKY else Dispatch.ROUND_ROBIN
    dispatch = Dispatch.KV if variant.kv_routing else own
    file = variant.policy_file()
    policy, scale_down = (file.build(), file.controller.scale_down) if file else (None, None)
    cluster = Cluster(model, case.workers, dispatch, policy, variant.planner(case.workers), scale_down=scale_down)
    cluster.run(arrivals)
    return Result(case, variant, report(cluster, len(arrivals), slo, WARM_UP * case.duration_s))


class Bound(msgspec.Struct, frozen=True):
    """What no policy can beat in a case."""

    case: Case
    ttft_p99_ms: float
    """Of the same requests, each alone on an idle worker that knows its prefix."""
    saved: float | None
    """Largest share of worker-hours: in each second as many workers as the KV of its requests fills, without a rest.

    KV of a run with all workers and KV routing: on fewer, fuller workers steps take longer, and more is held.
    None where the number of workers stays.
    """


def bound(case: Case, arrivals: list[Arrival], model: WorkerModel) -> Bound:
    """See ``Bound``."""
    step = model.step
    alone = []
    for arrival in arrivals:
        if arrival.time_s >= WARM_UP * case.duration_s:
            tokens = max(1, arrival.prompt_tokens - len(arrival.prefix) * model.prefix_block_tokens)
            alone.append(math.ceil(tokens / model.chunk_tokens) * step.base_s + tokens * step.per_prefill_token_s)
    ttft_p99_ms = 1e3 * float(np.percentile(alone, 99, method="higher"))
    if case.shape is not Shape.WAVE:
        return Bound(case, ttft_p99_ms, None)
    cluster = Cluster(model, case.workers, Dispatch.KV)
    cluster.watch()
    cluster.run(arrivals)
    needed = sum(max(1, math.ceil(load)) for _, load in cluster.loads) / 3600
    return Bound(case, ttft_p99_ms, 1.0 - needed / cluster.worker_hours())


def cases(sizes: list[int], loads: list[float], duration_s: float) -> list[Case]:
    """Large clusters are simulated for a shorter time, and waves on them at one load: they have as many requests."""
    found = []
    for workers in sizes:
        seconds = duration_s if workers <= 64 else max(0.2 * duration_s, 0.4 * duration_s * 256 / workers)
        found += [Case(workers, shape, load, seconds) for shape in (Shape.STICKY, Shape.HEAVY) for load in loads]
        found.append(Case(workers, Shape.EVEN, max(loads), seconds))
        if workers <= 64:
            waves = loads if workers <= 16 else [sorted(loads)[len(loads) // 2]]
            found += [Case(workers, Shape.WAVE, load, 8 * duration_s) for load in waves]
    return found
