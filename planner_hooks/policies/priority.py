# SPDX-License-Identifier: Apache-2.0
"""priority: moves less important neighbours away from a request that must keep its time per token.

Each class has the priority at which it begins and its promised step time. A worker is relieved when its step is slower
than the strictest class on it allows, until the predicted step is below ``floor`` of the promise. The prediction is
linear in batch size and KV (``step``), scaled to the worker's last measurement.
"""

from __future__ import annotations

from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from planner_hooks.ledger import Ledger
from planner_hooks.plan import HoldReason, Plan
from planner_hooks.policies.base import BasePolicy, PolicyConfig, coldest_that_fits
from planner_hooks.rules import Section
from planner_hooks.snapshot import Floats, Snapshot


class SloClass(Section):
    """One class of requests."""

    priority: int = Field(description="Requests of this priority and above belong to the class")
    tpot_ms: float = Field(gt=0, description="Time per output token that they are promised")


class StepModel(Section):
    """Step time = base + per-seq * batch + per-kv-token * KV; only the proportions matter."""

    base_s: float = Field(default=0.008, ge=0, description="Step of an empty batch")
    per_seq_s: float = Field(default=0.0001, ge=0, description="Added by each request")
    per_kv_token_s: float = Field(default=1.5e-7, ge=0, description="Added by each KV token held")

    def step_s(self, seqs: Floats, tokens: Floats) -> Floats:
        """Predicted steps."""
        step: Floats = self.base_s + self.per_seq_s * np.maximum(seqs, 0) + self.per_kv_token_s * np.maximum(tokens, 0)
        return step


class Config(PolicyConfig):
    """Settings of ``priority``."""

    classes: dict[str, SloClass] = Field(
        default_factory=lambda: {"interactive": SloClass(priority=1, tpot_ms=50.0)},
        description="SLO classes by name",
    )
    ceiling: float = Field(default=0.95, gt=0, le=1, description="Share of the promise from which a worker is relieved")
    floor: float = Field(default=0.85, gt=0, le=1, description="Share of the promise at which relieving stops")
    step: StepModel = Field(default=StepModel(), description="How step time follows load")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.floor >= self.ceiling:
            raise ValueError(f"floor ({self.floor:g}) must be below ceiling ({self.ceiling:g})")
        return self


class Priority(BasePolicy[Config]):
    """Protects SLO classes."""

    name = "priority"
    config_type = Config

    def decide(self, snapshot: Snapshot, ledger: Ledger) -> Plan:
        s = snapshot
        promise, level = self._promises(s)
        model = self.config.step.step_s(s.w_running, s.w_held)
        step = np.where(s.w_step_s > 0, s.w_step_s, 0.0)
        scale = np.where(step > 0, step / np.maximum(model, 1e-9), 1.0)
        late = s.w_fresh & ~s.w_leaving & (step > self.config.ceiling * promise)
        if not late.any():
            ledger.hold(HoldReason.BALANCED, detail="every class has its time per token")
            return ledger.close()
        tokens, seqs = s.w_held + s.w_inbound - s.w_outbound, s.w_running.copy()
        for src in np.flatnonzero(late)[np.argsort(-(step / promise)[late], kind="stable")]:
            self._relieve(ledger, int(src), promise, int(level[src]), scale, tokens, seqs)
        return ledger.close()

    def _promises(self, s: Snapshot) -> tuple[Floats, NDArray[np.int64]]:
        """Strictest promise on each worker, and its lowest priority."""
        count = len(s.worker_ids)
        promise, level = np.full(count, np.inf), np.full(count, np.iinfo(np.int32).max, dtype=np.int64)
        for slo in sorted(self.config.classes.values(), key=lambda c: -c.tpot_ms):
            rows = (s.r_priority >= slo.priority) & s.r_running
            has = np.bincount(s.r_worker[rows], minlength=count) > 0
            promise[has], level[has] = slo.tpot_ms / 1e3, slo.priority
        return promise, level

    def _relieve(
        self, ledger: Ledger, src: int, promise: Floats, level: int, scale: Floats, tokens: Floats, seqs: Floats
    ) -> None:
        s, model = ledger.snapshot, self.config.step
        rows = ledger.candidates(src)
        rows = rows[s.r_running[rows] & (s.r_priority[rows] < level)]
        lasts = self.rules.lasts_s(s, rows, src)
        relief = scale[src] * (model.per_seq_s + model.per_kv_token_s * s.r_kv[rows])
        gain = relief / promise[src] * lasts
        cost = self.rules.cost_s(s, rows)
        found = False
        for at in np.argsort(cost - gain, kind="stable"):
            predicted = scale[src] * model.step_s(seqs[src], tokens[src])
            if predicted <= self.config.floor * promise[src]:
                return
            if ledger.full or ledger.busy(src):
                ledger.hold(HoldReason.TICK_LIMIT if ledger.full else HoldReason.WORKER_LIMIT, src)
                return
            row = int(rows[at])
            # The neighbour must not break a promise at its destination, nor make it the fuller one: it would come back.
            there = scale * model.step_s(seqs + 1, tokens + s.r_need[row])
            fuller = ledger.usage + s.r_need[row] / s.w_capacity > ledger.usage[src]
            dst = coldest_that_fits(ledger, row, (there <= self.config.floor * promise) & ~fuller)
            if dst is None:
                ledger.hold(HoldReason.NO_DESTINATION, src, row)
                continue
            if ledger.move(row, dst, f"step of {1e3 * predicted:.1f} ms", float(gain[at])):
                found = True
                tokens[src] -= s.r_kv[row]
                tokens[dst] += s.r_need[row]
                seqs[src] -= 1
                seqs[dst] += 1
        if not found:
            ledger.hold(HoldReason.NO_CANDIDATE, src, detail="no less important neighbour can leave")


POLICY = Priority
