# SPDX-License-Identifier: Apache-2.0
"""consolidate: retires the worker that is cheapest to empty when the others suffice.

Where the planner decides the number of workers, this asks for fewer; otherwise the worker drains itself. A worker is
retired only while the others stay below ``target_usage`` with its load and keep a reserve; the retirement is taken back
above ``wake_usage``, and the distance between the two prevents oscillation. Small clusters need the reserve: a single
burst fills one worker of two, but not of twenty.
"""

from __future__ import annotations

from typing import Self

import numpy as np
from pydantic import Field, model_validator

from planner_hooks.ledger import Ledger
from planner_hooks.plan import HoldReason, Plan
from planner_hooks.policies.base import BasePolicy, PolicyConfig
from planner_hooks.snapshot import Snapshot


class Config(PolicyConfig):
    """Settings of ``consolidate``."""

    target_usage: float = Field(default=0.6, gt=0, lt=1, description="Mean usage that the remaining workers may have")
    wake_usage: float = Field(
        default=0.75, gt=0, le=1, description="Mean usage from which retired workers are taken back"
    )
    reserve: float = Field(
        default=1.0, ge=0, description="KV that the remaining ones keep free together, in workers; taken back at half"
    )
    min_workers: int = Field(default=1, ge=1, description="Workers that always stay")
    max_leaving: int = Field(default=1, ge=1, description="Workers that may be leaving at once, for whatever reason")
    max_leaving_share: float = Field(
        default=0.15, ge=0, le=1, description="The same as a share of all workers; the larger of the two counts"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.wake_usage <= self.target_usage:
            raise ValueError(
                f"wake-usage ({self.wake_usage:g}) must be above target-usage ({self.target_usage:g}), "
                "or workers would be retired and taken back in turn"
            )
        return self


class Consolidate(BasePolicy[Config]):
    """Keeps as few workers as suffice."""

    name = "consolidate"
    config_type = Config

    def decide(self, snapshot: Snapshot, ledger: Ledger) -> Plan:
        s, config = snapshot, self.config
        stays = np.flatnonzero(s.w_accepts)
        leaving = np.flatnonzero(s.w_leaving)
        # The others must also carry the load of leaving and stale workers.
        load = float((s.w_held + s.w_queued + s.w_inbound - s.w_outbound).sum())
        seats = float((s.w_running + s.w_waiting).sum())
        wake = min(config.wake_usage, 1.0 - 0.5 * config.reserve / max(1, len(stays)))
        if len(leaving) and self._mean(s, stays, load, seats) > wake:
            return ledger.close(release=tuple(s.worker_ids[w] for w in leaving))
        most = max(config.max_leaving, int(config.max_leaving_share * (len(stays) + len(leaving))))
        if len(leaving) >= most or len(stays) <= config.min_workers:
            ledger.hold(HoldReason.MIN_WORKERS, detail=f"{len(stays)} stay, {len(leaving)} are leaving")
            return ledger.close()
        victim = int(stays[np.argmin(emptying_cost(s, stays))])
        others = stays[stays != victim]
        mean = self._mean(s, others, load, seats)
        if mean > min(config.target_usage, 1.0 - config.reserve / max(1, len(others))):
            ledger.hold(HoldReason.BALANCED, detail=f"{len(others)} workers would be used to {mean:.2f}")
            return ledger.close()
        return ledger.close(retire=(s.worker_ids[victim],))

    @staticmethod
    def _mean(s: Snapshot, workers: np.ndarray, load: float, seats: float) -> float:
        if not len(workers):
            return float("inf")
        return max(load / float(s.w_capacity[workers].sum()), seats / float(s.w_max_seqs[workers].sum()))


def emptying_cost(snapshot: Snapshot, workers: np.ndarray) -> np.ndarray:
    """Cost of emptying each worker: tokens to move and, above all, requests that cannot move."""
    count = len(snapshot.worker_ids)
    stuck = np.bincount(snapshot.r_worker[~snapshot.r_free], minlength=count)
    tokens = snapshot.w_held + snapshot.w_queued + snapshot.w_inbound
    cost: np.ndarray = (stuck + tokens / snapshot.w_capacity)[workers]
    return cost


POLICY = Consolidate
