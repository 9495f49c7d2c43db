# SPDX-License-Identifier: Apache-2.0
"""Limits of every plan, and the cost of a move, for all policies of one policy file."""

from __future__ import annotations

from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from components.config import dashed
from planner_hooks.snapshot import Bools, Floats, Snapshot


class Section(BaseModel):
    """Base of every part of the policy file: dashed keys, nothing unknown."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, alias_generator=dashed, populate_by_name=True, use_attribute_docstrings=True
    )


class Limits(Section):
    """Limits of concurrent moves."""

    max_moves_per_tick: int = Field(
        default=256, ge=1, description="Moves that one decision may begin, waiting requests included"
    )
    max_moves_per_worker: int = Field(default=16, ge=1, description="Copies that a worker takes part in at once")
    max_moves_per_pair: int = Field(default=16, ge=1, description="Copies at once from one worker to another one")
    cooldown_s: float = Field(default=10.0, ge=0, description="Seconds that a request stays after it was moved")
    no_return_s: float = Field(
        default=60.0, ge=0, description="Seconds in which it is not sent back to where it came from"
    )
    max_destination_usage: float = Field(
        default=0.92,
        gt=0,
        le=1,
        description="KV share that a destination may reach, all that is promised to it included",
    )
    stale_after_s: float = Field(default=5.0, gt=0, description="A worker whose report is older takes no part")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_moves_per_pair > self.max_moves_per_worker:
            raise ValueError(
                f"max-moves-per-pair ({self.max_moves_per_pair}) exceeds max-moves-per-worker "
                f"({self.max_moves_per_worker}): lower it, or raise the other"
            )
        if self.no_return_s < self.cooldown_s:
            raise ValueError(
                f"no-return-s ({self.no_return_s:g}) is shorter than cooldown-s ({self.cooldown_s:g}) "
                "and would never apply: raise it"
            )
        return self


class Cost(Section):
    """Cost of a move. Bandwidth and fixed times are measured; these are their initial values, and weights."""

    bytes_per_s: float = Field(default=1e9, gt=0, description="Assumed speed of a migration before one was measured")
    overhead_s: float = Field(default=0.1, ge=0, description="Assumed time of a migration of zero bytes")
    downtime_s: float = Field(default=0.05, ge=0, description="Assumed pause of the moved request")
    disturbance: float = Field(
        default=0.1, ge=0, le=1, description="Share of both workers' speed lost while bytes flow"
    )
    kv_bytes_per_token: int = Field(
        default=0, ge=0, description="Used when the workers do not tell; 0 counts time only"
    )
    default_step_s: float = Field(default=0.03, gt=0, description="Step time of a worker that has not reported one")
    horizon_s: float = Field(default=30.0, gt=0, description="A gain later than this does not count")
    min_gain: float = Field(default=1.0, ge=0, description="Times that the predicted gain must exceed the cost")


class ScaleDownRules(Section):
    """Conditions for fewer decode workers."""

    delay_s: float = Field(
        default=30.0,
        ge=0,
        description="Seconds for which a reduction must have been proposed; half of what a worker takes to start",
    )
    share_per_delay: float = Field(
        default=0.25, ge=0, le=1, description="Share of the workers that may go within that time; one at least"
    )
    max_usage: float = Field(default=0.7, gt=0, le=1, description="Mean usage that the remaining workers may have")
    reserve: float = Field(default=1.0, ge=0, description="KV that the remaining ones keep free together, in workers")

    def delay(self, workers: int, since_s: float) -> float:
        """Time for which a reduction must be proposed; shorter within ``since_s`` after the last one."""
        return self.delay_s / (max(1.0, workers * self.share_per_delay) if since_s < 2 * self.delay_s else 1.0)

    def allowed(self, workers: int) -> float:
        """Highest mean usage of the remaining workers."""
        return min(self.max_usage, 1.0 - self.reserve / max(1, workers))


class Rules(Section):
    """Limits and cost, with the computations of all policies."""

    limits: Limits = Limits()
    cost: Cost = Cost()

    def movable(self, snapshot: Snapshot, rows: NDArray[np.int64]) -> Bools:
        """Mask of requests that may move now."""
        ready: Bools = snapshot.r_free[rows] & (snapshot.r_since_move[rows] >= self.limits.cooldown_s)
        return ready & (snapshot.r_running[rows] | snapshot.r_waiting[rows])

    def cost_s(self, snapshot: Snapshot, rows: NDArray[np.int64]) -> Floats:
        """Seconds of a worker's time that each move costs; 0 for a request without KV."""
        per_token = snapshot.bytes_per_token or float(self.cost.kv_bytes_per_token)
        wire = snapshot.r_kv[rows] * (per_token / snapshot.bytes_per_s)
        copy = snapshot.downtime_s + 2.0 * self.cost.disturbance * (snapshot.overhead_s + wire)
        cost: Floats = np.where(snapshot.r_waiting[rows], 0.0, copy)
        return cost

    def lasts_s(self, snapshot: Snapshot, rows: NDArray[np.int64], worker: int) -> Floats:
        """Remaining seconds of each request, within the horizon."""
        step = snapshot.w_step_s[worker] or self.cost.default_step_s
        lasts: Floats = np.minimum(snapshot.r_remaining[rows] * step, self.cost.horizon_s)
        return lasts
