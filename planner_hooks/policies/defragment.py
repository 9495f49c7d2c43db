# SPDX-License-Identifier: Apache-2.0
"""defragment: makes room for a queued prompt that fits no worker, although free KV suffices in total.

A waiting request that fits elsewhere moves there (nothing is copied). For one that fits nowhere, room is made on the
worker where that moves the fewest tokens, its own worker first.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from planner_hooks.ledger import Ledger
from planner_hooks.plan import HoldReason, Plan
from planner_hooks.policies.base import BasePolicy, PolicyConfig, coldest_that_fits
from planner_hooks.snapshot import Bools, Snapshot


class Config(PolicyConfig):
    """Settings of ``defragment``."""

    min_need_tokens: int = Field(default=0, ge=0, description="Smaller queued requests are left to the other policies")
    max_prompts_per_tick: int = Field(
        default=16, ge=1, description="Queued requests looked at in one decision, largest first"
    )
    watermark: float = Field(
        default=0.01, ge=0, lt=1, description="Share of KV that an engine keeps free when it admits"
    )
    max_moves_per_prompt: int = Field(default=8, ge=1, description="Requests moved away to make room for one")


class Defragment(BasePolicy[Config]):
    """Makes room on one worker for a queued prompt that fits nowhere."""

    name = "defragment"
    config_type = Config

    def decide(self, snapshot: Snapshot, ledger: Ledger) -> Plan:
        s = snapshot
        rows = np.flatnonzero(s.r_waiting & s.r_free & (s.r_need >= self.config.min_need_tokens))
        rows = rows[s.w_accepts[s.r_worker[rows]]]
        free = (1.0 - self.config.watermark) * s.w_capacity - s.w_held - s.w_inbound
        rows = rows[s.r_need[rows] > free[s.r_worker[rows]]]
        if not len(rows):
            ledger.hold(HoldReason.BALANCED, detail="no queued prompt lacks room where it waits")
            return ledger.close()
        largest = np.argsort(-s.r_need[rows], kind="stable")[: self.config.max_prompts_per_tick]
        served: set[int] = set()
        for row in rows[largest]:
            if ledger.full:
                ledger.hold(HoldReason.TICK_LIMIT)
                break
            self._serve(ledger, int(row), free, served)
        return ledger.close()

    def _serve(self, ledger: Ledger, row: int, free: NDArray[np.float64], served: set[int]) -> None:
        s = ledger.snapshot
        host, need = int(s.r_worker[row]), float(s.r_need[row])
        if need > (1.0 - self.config.watermark) * float(s.w_capacity.max()):
            ledger.hold(HoldReason.TOO_LARGE, host, row, f"{need:.0f} tokens")
            return
        if ledger.rules.movable(s, np.array([row]))[0]:
            dst = coldest_that_fits(ledger, row, free >= need)
            if dst is not None:
                step = s.w_step_s[dst] or self.rules.cost.default_step_s
                if ledger.move(row, dst, "it fits there and not here", float(s.r_remaining[row] * step)):
                    free[dst] -= need
                return
        if host in served:
            ledger.hold(HoldReason.WORKER_LIMIT, host, row, "room is already being made here")
            return
        served.add(host)
        self._make_room(ledger, row, host, need - float(free[host]))

    def _make_room(self, ledger: Ledger, row: int, host: int, lacking: float) -> None:
        s = ledger.snapshot
        rows = ledger.candidates(host)
        rows = rows[s.r_running[rows]]
        outbound = float(s.w_outbound[host])
        lacking -= outbound
        if lacking <= 0:
            ledger.hold(HoldReason.ALREADY_MOVING, host, row, "room is already being made")
            return
        chosen = self._choose(s.r_kv[rows], lacking)
        if chosen is None:
            ledger.hold(HoldReason.NO_CANDIDATE, host, row, f"{lacking:.0f} tokens cannot be freed here")
            return
        waits_s = float(np.median(self.rules.lasts_s(s, rows, host)))
        for at in rows[chosen]:
            dst = coldest_that_fits(ledger, int(at))
            if dst is None:
                ledger.hold(HoldReason.NO_DESTINATION, host, int(at))
            elif not ledger.move(int(at), dst, f"room for {s.request_ids[row]}", waits_s / len(chosen)):
                return

    def _choose(self, sizes: NDArray[np.float64], lacking: float) -> NDArray[np.int64] | None:
        """The smallest sufficient single request, or the largest ones together."""
        enough: Bools = sizes >= lacking
        if enough.any():
            found: NDArray[np.int64] = np.flatnonzero(enough)
            return found[[int(np.argmin(sizes[found]))]]
        order = np.argsort(-sizes, kind="stable")[: self.config.max_moves_per_prompt]
        total = np.cumsum(sizes[order])
        if not len(total) or total[-1] < lacking:
            return None
        return order[: int(np.searchsorted(total, lacking)) + 1]


POLICY = Defragment
