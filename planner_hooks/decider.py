# SPDX-License-Identifier: Apache-2.0
"""What stands behind the plugins: one controller and one scale-down for each policy file.

Life cycle: ``Decider.shared`` gives all plugins of a process the same one; it connects to the workers with the first
tick. ``begin`` starts a decision beside the caller and never waits. ``bound`` answers with what was seen last; what
is older than ``limits.stale-after-s`` counts as not seen. One asyncio loop. Raises ``ConfigError`` at its start when
the policy file is wrong; later failures are logged and tried again at the next tick.

Replay: Dynamo's own simulator has workers of numbers only. With ``replay_tokens`` (their KV capacity) the snapshot is
made up from forward-pass metrics, plans are counted and not carried out, victims count as empty a tick later, and
time passes with the ticks.
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
from components.client import DECISIONS, Workers
from components.errors import MigrateError
from planner_hooks.config import load
from planner_hooks.controller import HOLDS, MOVES, Controller
from planner_hooks.headcount import Headcount
from planner_hooks.metrics import made_up
from planner_hooks.observe import Observer
from planner_hooks.plan import HoldReason
from planner_hooks.report import Board
from planner_hooks.scaledown import Bound, ScaleDown
from planner_hooks.snapshot import Snapshot

logger = logging.getLogger(__name__)
_CONNECT_S = 30.0
NAME = "scale-down"


class Role(msgspec.Struct, frozen=True):
    """Workers of one kind whose number the planner decides."""

    name: str
    bounds: tuple[int, int] | None = None
    """Fewest and most; None keeps their number."""
    started: int = 0
    """How many the graph starts with; 0 when that is not known."""


class Decider:
    """See the module docstring."""

    _shared: ClassVar[dict[tuple[str, int], Decider]] = {}

    def __init__(self, policy_file: str, replay_tokens: int = 0) -> None:
        self.policy = load(Path(policy_file))
        self._replay_tokens = replay_tokens
        self._replayed = self.policy.build()
        self._observer = Observer(self.policy.controller.cost)
        self._board = Board()
        self._runtime: Any = None
        self._controller: Controller | None = None
        self._deciding: asyncio.Task[None] | None = None
        self._cut_off: asyncio.Task[None] | None = None
        self._scale_down: dict[str, ScaleDown] = {}
        self._counts: dict[str, Headcount] = {}
        self._seen: Snapshot | None = None
        self._seen_at = 0.0
        self.ticks = 0

    @classmethod
    def shared(cls, policy_file: str, replay_tokens: int = 0) -> Decider:
        """The one decider of this process for a policy file."""
        key = (str(Path(policy_file).resolve()), replay_tokens)
        if key not in cls._shared:
            cls._shared[key] = cls(policy_file, replay_tokens)
        return cls._shared[key]

    def begin(self, engines: Mapping[str, bytes] | None) -> None:
        """Start a decision unless one is under way. ``engines`` are the planner's forward-pass metrics."""
        self.ticks += 1
        if engines is not None:
            self._observer.join(engines)
        if self._replay_tokens:
            self._replay(engines or {})
        elif self._deciding is None or self._deciding.done():
            self._deciding = asyncio.ensure_future(self._decide())

    def retired(self) -> int:
        """Workers that a policy wants to be without."""
        return len(self._controller.retired) if self._controller is not None else 0

    def bound(self, role: Role, proposed: int, ready: int, scaling: bool) -> Bound:
        """What a proposal is clamped to; begins and ends the emptying of victims. Only decode workers are emptied."""
        if role.name != "decode":
            return self._prefill_bound(role, proposed, ready, scaling)
        if role.name not in self._scale_down:
            config = self.policy.controller
            self._scale_down[role.name] = ScaleDown(
                config.scale_down, role.bounds, config.drain_timeout_s, self._now, role.started
            )
        answer = self._scale_down[role.name].decide(proposed, ready, self._current(), scaling)
        if answer.reason is not None and (proposed < ready or answer.reason is HoldReason.MISSING):
            HOLDS.labels(NAME, answer.reason).inc()
        if answer.retire or answer.release or answer.at_most < ready:
            logger.info(
                "decode workers: %d are there, %d proposed, %d let through (%s); emptying %s, taking back %s",
                *(ready, proposed, answer.at_most, answer.reason or "empty"),
                *(", ".join(names) or "none" for names in (answer.retire, answer.release)),
            )
        if self._controller is not None:
            self._controller.retire(answer.retire)
            self._controller.release(answer.release)
        return answer

    def _prefill_bound(self, role: Role, proposed: int, ready: int, scaling: bool) -> Bound:
        count = self._counts.setdefault(role.name, Headcount(role.started, self._now))
        there = count.seen(ready, scaling)
        low, high = role.bounds or (there, there)
        if ready < there:
            return Bound(max(low, there), max(high, there), HoldReason.MISSING if proposed < there else None)
        count.let_through(max(low, proposed))
        return Bound(low, max(low, high))

    def _now(self) -> float:
        # Simulated time is not told to plugins: it passes with the ticks.
        return self.ticks * self.policy.controller.interval_s if self._replay_tokens else time.monotonic()

    def _current(self) -> Snapshot | None:
        fresh = self._now() - self._seen_at <= self.policy.controller.limits.stale_after_s
        return self._seen if fresh else None

    async def _decide(self) -> None:
        try:
            if self._controller is None:
                # The planner's own runtime already serves this port; the plugin is not given that runtime.
                os.environ.pop("DYN_SYSTEM_PORT", None)
                if self._runtime is None:
                    self._runtime = process.connect()
                    self._cut_off = asyncio.ensure_future(self._serve(self._runtime))
                workers = await Workers.connect(self._runtime, process.namespace(), _CONNECT_S)
                self._controller = Controller(self.policy, workers, self._observer)
            plan = await self._controller.tick()
            self._seen, self._seen_at = self._controller.seen, self._now()
            self._board.take(plan)
            if plan.moves or plan.retire:
                logger.info("%d moves planned; %s", len(plan.moves), self._controller.summary())
        except MigrateError as error:
            logger.warning("no decision about migrations: %s", error)
        except Exception:
            # The planner must go on whatever Dynamo's client raises here.
            logger.exception("no decision about migrations")

    async def _serve(self, runtime: Any) -> None:
        """Tell who asks what was decided, until the runtime has lost its place in etcd.

        The planner would then go on for ever without seeing anybody.
        """
        await runtime.endpoint(f"{process.namespace()}.{DECISIONS}").serve_endpoint(self._board.serve)
        logger.error("this planner has lost its place in etcd; it ends, for its launcher to start it again")
        os._exit(1)

    def _replay(self, engines: Mapping[str, bytes]) -> None:
        leaving = {victim for scale_down in self._scale_down.values() for victim in scale_down.victims}
        self._seen = Snapshot.of(made_up(engines, self._replay_tokens, leaving))
        self._seen_at = self._now()
        plan = self._replayed.plan(self._seen)
        for move in plan.moves:
            MOVES.labels(move.policy, "replayed").inc()
        if plan.moves:
            logger.info("%d moves planned on simulated workers", len(plan.moves))
