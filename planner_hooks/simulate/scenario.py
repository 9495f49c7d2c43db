# SPDX-License-Identifier: Apache-2.0
"""One cluster under a part of a trace, with and without policies: for ``dynamo policy simulate`` and the benchmark."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from planner_hooks.config import PolicyFile
from planner_hooks.simulate import traces
from planner_hooks.simulate.cluster import Cluster
from planner_hooks.simulate.model import Slo, WorkerModel, saturation_rate
from planner_hooks.simulate.report import Report, report
from planner_hooks.simulate.scaling import Scaling
from planner_hooks.simulate.traces import Arrival
from planner_hooks.simulate.upkeep import Ending

WARM_UP = 0.2
"""Share of a run whose requests are left out of the figures; a restart begins after it."""
BURSTGPT = "burstgpt"
"""In place of a file: conversations with BurstGPT's statistics."""


class Scenario(msgspec.Struct, frozen=True):
    """What happens. Everything that is compared gets the same requests."""

    trace: str
    """A file, or ``burstgpt``."""
    workers: int
    load: float
    """Share of the rate at which workers would be full if all prompts that ever came were cached."""
    seconds: float
    kv_tokens: int = WorkerModel().capacity_tokens
    """Of one worker."""
    swings: bool = False
    """The rate swings between a quarter and the whole, twice."""
    restarts: bool = False
    """All workers are restarted, a tenth of them at a time."""
    seed: int = 1
    """Of the times of copies of a trace, and of made loads."""

    @property
    def model(self) -> WorkerModel:
        """With two workers the frontend cannot repeat a request on a third one, and its worker relays."""
        return WorkerModel(capacity_tokens=self.kv_tokens, relays=self.workers == 2)


def requests(scenario: Scenario) -> list[Arrival]:
    """A part of the trace. Raises ``ConfigError``."""
    known = None if scenario.trace == BURSTGPT else traces.read(Path(scenario.trace))
    sample = known if known is not None else traces.burstgpt(100.0, 300.0)
    fits = [a for a in sample if a.prompt_tokens < 0.9 * scenario.kv_tokens]
    lengths = [a.prompt_tokens for a in fits], [a.output_tokens for a in fits]
    rate = saturation_rate(*lengths, traces.reused(sample), scenario.model) * scenario.workers * scenario.load
    seconds, seed = scenario.seconds, scenario.seed
    found = traces.burstgpt(rate, seconds, seed) if known is None else traces.replay(fits, rate, seconds, seed)
    if not scenario.swings:
        return found
    share = traces.swing(np.array([a.time_s for a in found]), scenario.seconds)
    kept = np.random.default_rng(1).random(len(found)) < share
    return [arrival for arrival, stays in zip(found, kept, strict=True) if stays]


def simulate(
    scenario: Scenario,
    arrivals: list[Arrival],
    policy: PolicyFile | None = None,
    ending: Ending = Ending.MOVE,
    scaling: Scaling | None = None,
    slo: Slo | None = None,
    model: WorkerModel | None = None,
) -> Report:
    """One run under Dynamo's KV routing; without ``policy`` nothing moves but off a worker that ends."""
    cluster = Cluster(
        model or scenario.model,
        scenario.workers,
        policy=policy.build() if policy is not None else None,
        scaling=scaling,
        tick_s=policy.controller.interval_s if policy is not None else 1.0,
        scale_down=policy.controller.scale_down if policy is not None else None,
        ending=ending,
    )
    if scenario.restarts:
        cluster.restart(WARM_UP * scenario.seconds)
    cluster.run(arrivals)
    return report(cluster, len(arrivals), slo or Slo(), WARM_UP * scenario.seconds)
