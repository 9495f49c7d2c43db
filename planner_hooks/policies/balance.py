# SPDX-License-Identifier: Apache-2.0
"""balance: moves requests from workers that are fuller than the others to the least used one, while it pays.

Waiting requests move first, off workers whose KV does not suffice for them: they have no KV to copy, and start at once
where there is room. Elsewhere they wait to be computed, and the router has placed them where their prefixes are cached:
another worker would compute more. Then running requests move. A worker keeps its requests below ``high`` or while it is
less than ``start_gap`` above the mean of the others: of very many, some are always far below it. Once it moves some, it
continues down to ``stop_gap``. Every move lowers the larger of two usages, so that moves end under a constant load.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Self

import numpy as np
from pydantic import Field, model_validator

from planner_hooks.ledger import Ledger
from planner_hooks.plan import HoldReason, Plan
from planner_hooks.policies.base import BasePolicy, PolicyConfig
from planner_hooks.snapshot import Snapshot

_FULL = 1.0
"""Virtual usage, queued demand included, from which a queue waits for KV."""


class Config(PolicyConfig):
    """Settings of ``balance``."""

    high: float = Field(default=0.9, ge=0, description="Virtual usage below which a worker is left alone")
    start_gap: float = Field(
        default=0.1, gt=0, description="Virtual usage above the mean of the others from which requests move"
    )
    stop_gap: float = Field(default=0.05, gt=0, description="The same at which moving ends")

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
        self._spread_queues(ledger)
        sources = snapshot.w_fresh & ~snapshot.w_leaving
        begun = np.zeros(len(sources), dtype=bool)
        while not ledger.full:
            hot = np.where(sources & ledger.idle(), ledger.usage, -np.inf)
            src = int(np.argmax(hot))
            cold = np.where(ledger.can_take(), ledger.usage, np.inf)
            high, gap = (0.0, self.config.stop_gap) if begun[src] else (self.config.high, self.config.start_gap)
            if not (hot[src] >= high and hot[src] - self._mean_of_others(ledger, src) >= gap):
                if not ledger.moves:
                    ledger.hold(HoldReason.BALANCED, detail=self._spread(ledger))
                return ledger.close()
            if self._move_one(ledger, src, cold):
                begun[src] = True
            else:
                sources[src] = False
        ledger.hold(HoldReason.TICK_LIMIT)
        return ledger.close()

    def _spread_queues(self, ledger: Ledger) -> None:
        s = ledger.snapshot
        queues = np.unique(s.r_worker[s.r_waiting & s.r_free])
        queues = queues[s.w_accepts[queues] & (ledger.usage[queues] >= max(self.config.high, _FULL))]
        # Queues can be long: a heap has the coldest worker.
        cold = [(float(ledger.usage[dst]), int(dst)) for dst in np.flatnonzero(s.w_accepts)]
        heapify(cold)
        for src in queues[np.argsort(-ledger.usage[queues], kind="stable")].tolist():
            rows = ledger.candidates(src)
            gap = self.config.start_gap
            for row in rows[s.r_waiting[rows]].tolist():
                if ledger.full:
                    return
                here = float(ledger.usage[src])
                dst = self._coldest(ledger, row, here, gap, cold)
                if dst is None:
                    break
                there = float(ledger.usage[dst])
                seconds = float(s.r_remaining[row]) * float(s.w_step_s[src] or self.rules.cost.default_step_s)
                ledger.move(row, dst, f"it waits; usage {here:.2f} here, {there:.2f} there", (here - there) * seconds)
                heappush(cold, (float(ledger.usage[dst]), dst))
                gap = self.config.stop_gap

    @staticmethod
    def _coldest(ledger: Ledger, row: int, here: float, gap: float, cold: list[tuple[float, int]]) -> int | None:
        """Take the coldest worker that may get a waiting request off the heap; None leaves the heap unchanged."""
        passed: list[tuple[float, int]] = []
        found = None
        while found is None and cold and cold[0][0] <= here - gap and len(passed) < 8:
            usage, dst = heappop(cold)
            if usage != ledger.usage[dst]:
                heappush(cold, (float(ledger.usage[dst]), dst))  # It has become a source.
            elif ledger.why_not(row, dst) is None and ledger.usage_with(dst, np.array([row]))[0] < here:
                found = dst
            else:
                passed.append((usage, dst))
        for entry in passed:
            heappush(cold, entry)
        return found

    def _move_one(self, ledger: Ledger, src: int, cold: np.ndarray) -> bool:
        s, rules = ledger.snapshot, ledger.rules
        rows = ledger.candidates(src)
        rows = rows[s.r_running[rows]]
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
    def _mean_of_others(ledger: Ledger, worker: int) -> float:
        others = ledger.snapshot.w_accepts.copy()
        others[worker] = False
        return float(ledger.usage[others].mean()) if others.any() else np.inf

    @staticmethod
    def _spread(ledger: Ledger) -> str:
        seen = ledger.usage[ledger.snapshot.w_accepts]
        return f"usage {seen.min():.2f} to {seen.max():.2f}" if len(seen) else "no worker accepts requests"


POLICY = Balance
