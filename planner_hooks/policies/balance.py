# SPDX-License-Identifier: Apache-2.0
"""balance: from the worker with the highest virtual usage to the one with the lowest, while that pays.

Nothing happens below ``high`` or while the gap between the two is below ``start_gap``; once begun it goes on down to
``stop_gap``. Every move lowers the larger of the two usages, so that a static load comes to rest.
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
    """Settings of ``balance``."""

    high: float = Field(default=0.6, ge=0, description="Virtual usage below which a worker is left alone")
    start_gap: float = Field(default=0.2, gt=0, description="Gap in virtual usage that begins to move requests")
    stop_gap: float = Field(default=0.1, gt=0, description="Gap at which moving ends")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.stop_gap >= self.start_gap:
            raise ValueError(f"stop-gap ({self.stop_gap:g}) must be below start-gap ({self.start_gap:g})")
        return self


class Balance(BasePolicy[Config]):
    """Evens out virtual usage."""

    name = "balance"
    config_type = Config

    def decide(self, snapshot: Snapshot, ledger: Ledger) -> Plan:
        sources = snapshot.w_fresh & ~snapshot.w_leaving
        high, gap = self.config.high, self.config.start_gap
        while not ledger.full:
            hot = np.where(sources & ledger.idle(), ledger.usage, -np.inf)
            src = int(np.argmax(hot))
            cold = np.where(ledger.can_take(), ledger.usage, np.inf)
            dst = int(np.argmin(cold))
            if not (hot[src] >= high and hot[src] - cold[dst] >= gap):
                if not ledger.moves:
                    ledger.hold(HoldReason.BALANCED, detail=self._spread(ledger))
                return ledger.close()
            if self._move_one(ledger, src, cold):
                high, gap = 0.0, self.config.stop_gap
            else:
                sources[src] = False
        ledger.hold(HoldReason.TICK_LIMIT)
        return ledger.close()

    def _move_one(self, ledger: Ledger, src: int, cold: np.ndarray) -> bool:
        s, rules = ledger.snapshot, ledger.rules
        rows = ledger.candidates(src)
        if not len(rows):
            ledger.hold(HoldReason.NO_CANDIDATE, src)
            return False
        lasts, cost = rules.lasts_s(s, rows, src), rules.cost_s(s, rows)
        after_src = ledger.usage_without(src, rows)
        reason = HoldReason.NO_DESTINATION
        for dst in np.argsort(cold, kind="stable")[:4]:
            dst = int(dst)
            if not np.isfinite(cold[dst]) or cold[dst] >= ledger.usage[src] or not ledger.pair_is_free(src, dst):
                continue
            drop = ledger.usage[src] - np.maximum(after_src, ledger.usage_with(dst, rows))
            gain = drop * lasts
            net = np.where(ledger.fits(dst, rows) & (drop > 1e-9), gain - rules.cost.min_gain * cost, -np.inf)
            best = int(np.argmax(net))
            if net[best] > 0:
                text = f"usage {ledger.usage[src]:.2f} here, {ledger.usage[dst]:.2f} there"
                return ledger.move(int(rows[best]), dst, text, float(gain[best]))
            if np.isfinite(net[best]):
                reason = HoldReason.NOT_WORTH
        ledger.hold(reason, src)
        return False

    @staticmethod
    def _spread(ledger: Ledger) -> str:
        seen = ledger.usage[ledger.snapshot.w_accepts]
        return f"usage {seen.min():.2f} to {seen.max():.2f}" if len(seen) else "no worker accepts requests"


POLICY = Balance
