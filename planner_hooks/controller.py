# SPDX-License-Identifier: Apache-2.0
"""Observes, plans, and carries plans out through workers; keeps the outcome of each move.

Life cycle: ``tick`` once for every decision; ``close`` cancels running calls without waiting (workers finish their
part). One asyncio loop, one tick at a time; a tick never waits for a migration, and at most ``_PATIENCE_S`` for
workers. Its computation runs in a thread, so that a table of a hundred thousand requests does not block the planner's
loop.
Errors: ``tick`` raises ``WorkerLost`` until the first report of a worker; a failed move is an outcome.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, Protocol

import msgspec
from prometheus_client import Counter as Metric

from components.client import Drained
from components.errors import MigrateError, NoRoom, Refused, RequestNotFound, WorkerLost, WorkerNotFound
from components.migration.messages import Mode, MoveRecord
from planner_hooks.config import PolicyFile
from planner_hooks.observe import Look, Observer
from planner_hooks.plan import HoldReason, Move, Plan
from planner_hooks.snapshot import ActiveMove, Snapshot
from planner_hooks.table import Table

logger = logging.getLogger(__name__)
MOVES = Metric("dynamo_migrate_planner_moves", "Moves that policies planned", ["policy", "outcome"])
_PATIENCE_S = 0.5
_NOTHING_DONE = (NoRoom.code, Refused.code, RequestNotFound.code, WorkerNotFound.code)
"""Codes for a request or worker that is no longer as planned."""
HOLDS = Metric("dynamo_migrate_planner_holds", "What policies left alone", ["policy", "reason"])


class Commands(Protocol):
    """The part of ``planner_hooks.table.Tables`` in use."""

    async def refresh(self, patience_s: float) -> None:
        """Ask all workers."""
        ...

    def tables(self) -> Sequence[Table]:
        """Their last answers."""
        ...

    def moves(self) -> tuple[MoveRecord, ...]:
        """The last moves."""
        ...

    async def migrate(self, request_id: str, source: str, target: str, mode: Mode, life: int) -> MoveRecord:
        """Move one request."""
        ...

    async def drain(self, worker: str, timeout_s: float) -> Drained:
        """Empty a worker, which gets no new requests."""
        ...

    async def undrain(self, worker: str) -> None:
        """Give a worker requests again."""
        ...


class Outcome(msgspec.Struct, frozen=True):
    """Outcome of a planned move."""

    move: Move
    ok: bool
    reason: str = ""
    begun: bool = True
    """False when request or worker were no longer as planned, and nothing was done."""
    downtime_s: float = 0.0
    total_s: float = 0.0
    gap_before: float = 0.0
    """KV share in use at the source minus that at the destination, at planning."""
    gap_after: float | None = None
    """The same at the first decision after the move: the real gain."""


class Controller:
    """See the module docstring."""

    def __init__(
        self,
        policy: PolicyFile,
        commands: Commands,
        observer: Observer,
        clock: Callable[[], float] = time.monotonic,
        drains: bool = True,
    ) -> None:
        self._config = policy.controller
        self._policy = policy.build()
        self._commands = commands
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
        self.outcomes: deque[Outcome] = deque(maxlen=self._config.history)
        self.ticks = 0

    async def tick(self) -> Plan:
        """One decision. Its moves continue after the return."""
        await self._commands.refresh(_PATIENCE_S)
        tables = self._commands.tables()
        if all(table.told_at is None for table in tables):
            raise WorkerLost("no worker tells its state")
        self._forget_shown(tables)
        self._backoff = {pair: until for pair, until in self._backoff.items() if until > self._clock()}
        active = (*self._active.values(), *(move for _, move in self._ended))
        look = self._observer.look(tables, self._commands.moves(), active)
        seen, plan = await asyncio.to_thread(self._decide, look)
        self.seen = seen
        self._settle_gaps(seen)
        self.ticks += 1
        for (policy, reason), number in Counter((hold.policy, hold.reason) for hold in plan.holds).items():
            HOLDS.labels(policy, reason).inc(number)
        for move in plan.moves:
            # The life that was observed: a move must not hit one that has left and come back since.
            self._begin(move, _gap(seen, move), look.rows.row(move.row).life)
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

    def _begin(self, move: Move, gap: float, life: int) -> None:
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
        self._spawn(self._carry_out(move, gap, life))

    async def _carry_out(self, move: Move, gap: float, life: int) -> None:
        try:
            record = await asyncio.wait_for(
                self._commands.migrate(move.request_id, move.src, move.dst, move.mode, life),
                self._config.migration_timeout_s,
            )
            reason = f"{record.code}: {record.reason}" if record.code else record.reason
            begun = record.code not in _NOTHING_DONE
            outcome = Outcome(move, record.ok, reason, begun, record.downtime_s, record.total_s, gap)
        except TimeoutError:
            outcome = Outcome(move, False, f"not over after {self._config.migration_timeout_s:g} s", gap_before=gap)
        except MigrateError as error:
            outcome = Outcome(move, False, f"{error.code}: {error}", error.code not in _NOTHING_DONE, gap_before=gap)
        finally:
            self._ended.append((self._clock(), self._active.pop(move.request_id)))
        self.outcomes.append(outcome)
        failed = "failed" if outcome.begun else HoldReason.WORLD_CHANGED
        MOVES.labels(move.policy, "done" if outcome.ok else failed).inc()
        if not outcome.ok:
            # The request may have ended: only its pair rests, and not for long.
            self._backoff[move.src, move.dst] = self._clock() + self._config.failure_backoff_s
            logger.info("request %s stayed on %s: %s", move.request_id, move.src, outcome.reason)

    async def _drain(self, worker: str) -> None:
        try:
            drained = await self._commands.drain(worker, self._config.drain_timeout_s)
            if drained.left:
                logger.warning("worker %s is not empty: %d requests are left", worker, drained.left)
        except MigrateError as error:
            logger.warning("worker %s is not empty: %s", worker, error)

    async def _undrain(self, worker: str) -> None:
        try:
            await self._commands.undrain(worker)
        except MigrateError as error:
            logger.warning("worker %s is not taken back: %s", worker, error)

    def _settle_gaps(self, seen: Snapshot) -> None:
        for at, outcome in enumerate(self.outcomes):
            if outcome.ok and outcome.gap_after is None:
                self.outcomes[at] = msgspec.structs.replace(outcome, gap_after=_gap(seen, outcome.move))

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def summary(self) -> str:
        """One line for the log."""
        counts = Counter("done" if outcome.ok else "failed" for outcome in self.outcomes)
        return f"{self.ticks} decisions, {counts['done']} moves done, {counts['failed']} failed"

    async def idle(self) -> None:
        """Wait for all begun calls."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    def close(self) -> None:
        """Cancel everything."""
        for task in self._tasks:
            task.cancel()


def _gap(seen: Snapshot, move: Move) -> float:
    src, dst = (seen.index.get(worker) for worker in (move.src, move.dst))
    return _share(seen, src) - _share(seen, dst)


def _share(seen: Snapshot, worker: int | None) -> float:
    return 0.0 if worker is None else float(seen.w_held[worker] / seen.w_capacity[worker])
