# SPDX-License-Identifier: Apache-2.0
"""Base of all policies: a configuration, the shared rules, and the search for a destination."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Generic, Protocol, TypeVar

import numpy as np
from pydantic import Field

from planner_hooks.ledger import Ledger
from planner_hooks.plan import HoldReason, Plan
from planner_hooks.rules import Rules, Section
from planner_hooks.snapshot import Snapshot


class Policy(Protocol):
    """A policy is one pure function: same snapshot, same plan."""

    name: str

    def plan(self, snapshot: Snapshot) -> Plan:
        """Decide. Must not change the snapshot, keep state, read clocks or do I/O."""
        ...


class PolicyConfig(Section):
    """Fields of every policy."""

    enabled: bool = Field(default=True, description="Switch the policy off without removing its settings")


C = TypeVar("C", bound=PolicyConfig)


class BasePolicy(ABC, Generic[C]):
    """Subclasses set ``config_type`` and define ``decide``."""

    name: ClassVar[str]
    config_type: ClassVar[type[PolicyConfig]]

    def __init__(self, config: C, rules: Rules) -> None:
        self.config = config
        self.rules = rules

    def plan(self, snapshot: Snapshot) -> Plan:
        """See ``Policy``."""
        ledger = Ledger(snapshot, self.rules, self.name)
        if not snapshot.w_fresh.any():
            ledger.hold(HoldReason.STALE if len(snapshot.worker_ids) else HoldReason.NO_METRICS)
            return ledger.close()
        return self.decide(snapshot, ledger)

    @abstractmethod
    def decide(self, snapshot: Snapshot, ledger: Ledger) -> Plan:
        """Add moves with ``ledger.move`` and reasons with ``ledger.hold``; return ``ledger.close()``."""
        ...


def coldest_that_fits(ledger: Ledger, row: int, allowed: np.ndarray | None = None) -> int | None:
    """The least used worker that every rule allows for a request, or None."""
    s = ledger.snapshot
    src = int(s.r_worker[row])
    fits = ledger.takers(row) if allowed is None else ledger.takers(row) & allowed
    workers = np.flatnonzero(fits)
    for worker in workers[np.argsort(ledger.usage[workers], kind="stable")[:16]]:
        if ledger.pair_is_free(src, int(worker), copies=not s.r_waiting[row]):
            return int(worker)
    return None


def empty(ledger: Ledger, worker: int, reason: str, let_finish_s: float) -> None:
    """Move everything with a destination off a worker: waiting requests, then the largest first.

    Requests that will end within ``let_finish_s`` stay.
    """
    s = ledger.snapshot
    rows = ledger.candidates(worker)
    if not len(rows):
        if len(s.rows_of(worker)):
            ledger.hold(HoldReason.NO_CANDIDATE, worker, detail="what is left cannot move, or is moving")
        return
    lasts = ledger.rules.lasts_s(s, rows, worker)
    order = np.lexsort((-s.r_need[rows], ~s.r_waiting[rows]))
    stays = ledger.rules.cost_s(s, rows) + let_finish_s > lasts
    for at in order:
        row = int(rows[at])
        if ledger.full or (ledger.busy(worker) and not s.r_waiting[row]):
            ledger.hold(HoldReason.TICK_LIMIT if ledger.full else HoldReason.WORKER_LIMIT, worker)
            return
        if stays[at] and not s.r_waiting[row]:
            ledger.hold(HoldReason.NOT_WORTH, worker, row, "it ends soon by itself")
            continue
        dst = coldest_that_fits(ledger, row)
        if dst is None:
            ledger.hold(HoldReason.NO_DESTINATION, worker, row, f"{s.r_need[row]:.0f} tokens fit nowhere")
            continue
        ledger.move(row, dst, reason, float(lasts[at]))
