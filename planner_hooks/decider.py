# SPDX-License-Identifier: Apache-2.0
"""Shared state of the plugins: one controller and one scale-down for each policy file.

Life cycle: ``Decider.shared`` returns the same one to all plugins of a process; it connects to the workers at the first
tick. ``begin`` starts a decision in the background and never waits. ``bound`` uses the last snapshot; one that is older
than ``limits.stale-after-s`` is ignored. One asyncio loop. Raises ``ConfigError`` at its start for a wrong policy file;
later failures are logged and tried again at the next tick.

A leaving worker has one owner. Where the planner decides the number of decode workers (``sets_number``), a policy's
retirement is a request for fewer workers, and the process that stops a worker drains it; otherwise the worker drains
itself.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from components import process
from components.client import DECISIONS
from components.errors import MigrateError
from planner_hooks.config import load
from planner_hooks.controller import HOLDS, Controller
from planner_hooks.headcount import Headcount
from planner_hooks.observe import Observer
from planner_hooks.plan import HoldReason
from planner_hooks.report import Board
from planner_hooks.scaledown import Bound, ScaleDown
from planner_hooks.snapshot import Snapshot
from planner_hooks.table import Tables

logger = logging.getLogger(__name__)
_CONNECT_S = 30.0
NAME = "scale-down"


class Role(msgspec.Struct, frozen=True):
    """Workers of one role that the planner scales."""

    name: str
    bounds: tuple[int, int] | None = None
    """Fewest and most; None: a fixed number."""
    started: int = 0
    """Number at the start of the graph; 0: unknown."""


class Decider:
    """See the module docstring."""

    _shared: ClassVar[dict[str, Decider]] = {}

    def __init__(self, policy_file: str) -> None:
        self.policy = load(Path(policy_file))
        self.sets_number = False
        """True when the planner decides the number of decode workers. Set before the first tick."""
        self._observer = Observer(self.policy.controller.cost)
        self._board = Board()
        self._runtime: Any = None
        self._controller: Controller | None = None
        self._deciding: asyncio.Task[None] | None = None
        self._cut_off: asyncio.Task[None] | None = None
        self._scale_down: dict[str, ScaleDown] = {}
        self._counts: dict[str, Headcount] = {}
        self._seen_at = 0.0

    @classmethod
    def shared(cls, policy_file: str) -> Decider:
        """The one decider of this process for a policy file."""
        key = str(Path(policy_file).resolve())
        if key not in cls._shared:
            cls._shared[key] = cls(policy_file)
        return cls._shared[key]

    def begin(self, engines: Mapping[str, bytes] | None) -> None:
        """Start a decision unless one is running. ``engines`` are the planner's forward-pass metrics."""
        if engines is not None:
            self._observer.join(engines)
        if self._deciding is None or self._deciding.done():
            self._deciding = asyncio.ensure_future(self._decide())

    def unneeded(self) -> int:
        """Number of workers that policies would retire."""
        return self._controller.unneeded if self._controller is not None else 0

    def bound(self, role: Role, proposed: int, ready: int, scaling: bool) -> Bound:
        """Bounds of a proposal. A reduction of prefill workers passes at once: no request has to leave them."""
        if role.name != "decode":
            return self._prefill_bound(role, proposed, ready, scaling)
        if role.name not in self._scale_down:
            rules = self.policy.controller.scale_down
            self._scale_down[role.name] = ScaleDown(rules, role.bounds, started=role.started)
        answer = self._scale_down[role.name].decide(proposed, ready, self._current(), scaling)
        if answer.reason is not None and (proposed < ready or answer.reason is HoldReason.MISSING):
            HOLDS.labels(NAME, answer.reason).inc()
        if answer.at_most < ready:
            logger.info("decode workers: %d of %d will do", answer.at_most, ready)
        return answer

    def _prefill_bound(self, role: Role, proposed: int, ready: int, scaling: bool) -> Bound:
        count = self._counts.setdefault(role.name, Headcount(role.started, time.monotonic))
        there = count.seen(ready, scaling)
        low, high = role.bounds or (there, there)
        if ready < there:
            return Bound(max(low, there), max(high, there), HoldReason.MISSING if proposed < there else None)
        count.let_through(max(low, proposed))
        return Bound(low, max(low, high))

    def _current(self) -> Snapshot | None:
        fresh = time.monotonic() - self._seen_at <= self.policy.controller.limits.stale_after_s
        return self._controller.seen if fresh and self._controller is not None else None

    async def _decide(self) -> None:
        try:
            if self._controller is None:
                # The planner's runtime already serves this port; the plugin has no access to that runtime.
                os.environ.pop("DYN_SYSTEM_PORT", None)
                if self._runtime is None:
                    self._runtime = process.connect()
                    self._cut_off = asyncio.ensure_future(self._serve(self._runtime))
                workers = await Tables.connect(self._runtime, process.namespace(), _CONNECT_S)
                self._controller = Controller(self.policy, workers, self._observer, drains=not self.sets_number)
            plan = await self._controller.tick()
            self._seen_at = time.monotonic()
            self._board.take(plan)
            if plan.moves or plan.retire:
                logger.info("%d moves planned; %s", len(plan.moves), self._controller.summary())
        except MigrateError as error:
            logger.warning("no decision about migrations: %s", error)
        except Exception:
            # The planner must go on after any exception of Dynamo's client.
            logger.exception("no decision about migrations")

    async def _serve(self, runtime: Any) -> None:
        """Serve the decisions, until the runtime has lost its lease in etcd.

        The planner would then go on without seeing any worker.
        """
        await runtime.endpoint(f"{process.namespace()}.{DECISIONS}").serve_endpoint(self._board.serve)
        process.end_cut_off("planner")
