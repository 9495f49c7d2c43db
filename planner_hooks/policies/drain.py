# SPDX-License-Identifier: Apache-2.0
"""drain: a worker that is to go counts as infinitely loaded; everything on it moves to the least loaded others."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from planner_hooks.ledger import Ledger
from planner_hooks.plan import HoldReason, Plan
from planner_hooks.policies.base import BasePolicy, PolicyConfig, empty
from planner_hooks.snapshot import Snapshot


class Config(PolicyConfig):
    """Settings of ``drain``."""

    let_finish_s: float = Field(default=1.0, ge=0, description="Requests that end within this time are not moved")


class Drain(BasePolicy[Config]):
    """Empties draining and retired workers."""

    name = "drain"
    config_type = Config

    def decide(self, snapshot: Snapshot, ledger: Ledger) -> Plan:
        for worker in np.flatnonzero(snapshot.w_leaving):
            if not snapshot.w_fresh[worker]:
                ledger.hold(HoldReason.STALE, int(worker))
                continue
            empty(ledger, int(worker), "the worker is leaving", self.config.let_finish_s)
        return ledger.close()


POLICY = Drain
