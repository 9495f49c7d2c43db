# SPDX-License-Identifier: Apache-2.0
"""Observes, plans, and carries plans out through workers; counts the outcomes of moves.

Life cycle: ``tick`` once for every decision. One asyncio loop, one tick at a time; a tick never waits for a migration,
and at most ``_PATIENCE_S`` for workers. Its computation runs in a thread, so that a table of a hundred thousand
requests does not block the planner's loop.
Errors: ``tick`` raises ``WorkerLost`` until the first report of a worker; a failed move is counted and logged.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from prometheus_client import Counter as Metric

from components.errors import MigrateError, NoRoom, Refused, RequestNotFound, WorkerLost, WorkerNotFound
from components.migration.messages import Mode
from planner_hooks.config import PolicyFile
from planner_hooks.observe import Look, Observer
from planner_hooks.plan import HoldReason, Move, Plan
from planner_hooks.snapshot import ActiveMove, Snapshot
from planner_hooks.table import Table, Tables

logger = logging.getLogger(__name__)
MOVES = Metric("dynamo_migrate_planner_moves", "Moves that policies planned", ["policy", "outcome"])
_PATIENCE_S = 0.5
_NOTHING_DONE = (NoRoom.code, Refused.code, RequestNotFound.code, WorkerNotFound.code)
"""Codes for a request or worker that is no longer as planned."""
HOLDS = Metric("dynamo_migrate_planner_holds", "What policies left alone", ["policy", "reason"])


class Controller:
    """See the module docstring."""

    def __init__(
        self,
        policy: PolicyFile,
        workers: Tables,
        observer: Observer,
        clock: Callable[[], float] = time.monotonic,
        drains: bool = True,
    ) -> None:
        self._config = policy.controller
        self._policy = policy.build()
        self._workers = workers
        self._observer = observer
        self._clock = clock
        self._active: dict[str, ActiveMove] = {}
        self._ended: list[tuple[float, ActiveMove]] = []
        """Moves that workers' tables (up to a second old) may not show yet."""
        self._backoff: dict[tuple[str, str], float] = {}
        self._drains = drains
        self._retired: set[str] = set()
        """Workers drained for a policy."""
        self.unneeded = 0
        """Workers that the last plan would retire, where this process does not drain them."""
        self.seen: Snapshot | None = None
        """Input of the last decision."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self.outcomes: Counter[str] = Counter()
        """Ended moves: ``done``, ``failed``, or ``world-changed`` when nothing was done."""
        self.ticks = 0

    async def tick(self) -> Plan:
        """One decision. Its moves continue after the return."""
        await self._workers.refresh(_PATIENCE_S)
        tables = self._workers.tables()
        if all(table.told_at is None for table in tables):
            raise WorkerLost("no worker tells its state")
        self._forget_shown(tables)
        self._backoff = {pair: until for pair, until in self._backoff.items() if until > self._clock()}
        active = (*self._active.values(), *(move for _, move in self._ended))
        look = self._observer.look(tables, self._workers.moves(), active)
        seen, plan = await asyncio.to_thread(self._decide, look)
        self.seen = seen
        self.ticks += 1
        for (policy, reason), number in Counter((hold.policy, hold.reason) for hold in plan.holds).items():
            HOLDS.labels(policy, reason).inc(number)
        for move in plan.moves:
            # The life that was observed: a move must not hit one that has left and come back since.
            self._begin(move, look.rows.row(move.row).life)
        self._retire(plan, set(seen.worker_ids))
        return plan

    def _decide(self, look: Look) -> tuple[Snapshot, Plan]:
        seen = self._observer.snapshot(look, self._config.limits.stale_after_s)
        return seen, self._policy.plan(seen)

    def _forget_shown(self, tables: Iterable[Table]) -> None:
        """An ended move is over for policies after the next table of its source."""
        now = self._clock()
        told = {table.worker: -math.inf if table.told_at is None else table.told_at for table in tables}
        self._ended = [(at, move) for at, move in self._ended if told.get(move.src, now) <= at]

    def _retire(self, plan: Plan, there: set[str]) -> None:
        """Drain workers that the plan retires, and take back those that it needs; or only note the former."""
        if self._config.dry_run:
            for worker in plan.retire:
                logger.info("would do without worker %s", worker)
            return
        if not self._drains:
            self.unneeded = len(plan.retire)
            return
        self._retired &= there
        for worker in sorted(set(plan.retire) - self._retired):
            self._spawn(self._drain(worker))
        for worker in sorted(self._retired & set(plan.release)):
            self._spawn(self._undrain(worker))
        self._retired = (self._retired | set(plan.retire)) - set(plan.release)

    def _begin(self, move: Move, life: int) -> None:
        what = f"{move.request_id} from {move.src} to {move.dst} ({move.policy}: {move.reason})"
        if self._config.dry_run:
            logger.info("would move %s", what)
            MOVES.labels(move.policy, HoldReason.DRY_RUN).inc()
            return
        if self._backoff.get((move.src, move.dst), 0.0) > self._clock():
            HOLDS.labels(move.policy, HoldReason.COOLDOWN).inc()
            return
        logger.info("moving %s", what)
        self._active[move.request_id] = ActiveMove(
            move.request_id, move.src, move.dst, move.tokens, copies=move.mode is not Mode.REPLAY
        )
        self._spawn(self._carry_out(move, life))

    async def _carry_out(self, move: Move, life: int) -> None:
        try:
            record = await asyncio.wait_for(
                self._workers.migrate(move.request_id, move.src, move.dst, move.mode, life),
                self._config.migration_timeout_s,
            )
            ok, code, reason = record.ok, record.code, record.reason
        except TimeoutError:
            ok, code, reason = False, "", f"not over after {self._config.migration_timeout_s:g} s"
        except MigrateError as error:
            ok, code, reason = False, error.code, str(error)
        finally:
            self._ended.append((self._clock(), self._active.pop(move.request_id)))
        outcome = "done" if ok else HoldReason.WORLD_CHANGED if code in _NOTHING_DONE else "failed"
        self.outcomes[outcome] += 1
        MOVES.labels(move.policy, outcome).inc()
        if not ok:
            # The request may have ended: only its pair rests, and not for long.
            self._backoff[move.src, move.dst] = self._clock() + self._config.failure_backoff_s
            why = f"{code}: {reason}" if code else reason
            logger.info("request %s stayed on %s: %s", move.request_id, move.src, why)

    async def _drain(self, worker: str) -> None:
        try:
            drained = await self._workers.drain(worker, self._config.drain_timeout_s)
            if drained.left:
                logger.warning("worker %s is not empty: %d requests are left", worker, drained.left)
        except MigrateError as error:
            logger.warning("worker %s is not empty: %s", worker, error)

    async def _undrain(self, worker: str) -> None:
        try:
            await self._workers.undrain(worker)
        except MigrateError as error:
            logger.warning("worker %s is not taken back: %s", worker, error)

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def summary(self) -> str:
        """One line for the log."""
        done = self.outcomes["done"]
        return f"{self.ticks} decisions, {done} moves done, {self.outcomes.total() - done} failed"

    async def idle(self) -> None:
        """Wait for all begun calls."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))
