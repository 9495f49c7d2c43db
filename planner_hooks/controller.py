# SPDX-License-Identifier: Apache-2.0
"""Observes, plans, and carries plans out through the routers; keeps what became of each move.

Life cycle: ``tick`` once for every decision; ``close`` waits for nothing and cancels what is under way (the routers
end their part themselves). One asyncio loop, one tick at a time; a tick never waits for a migration. Its arithmetic
runs in a thread, so that a table of a hundred thousand requests does not hold the planner's loop.
Errors: ``tick`` raises ``MigrateError`` when no router answers; a failed move is an outcome.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Protocol

import msgspec
from prometheus_client import Counter as Metric

from components.errors import MigrateError, NoRoom, RequestNotFound
from components.messages import Mode, MoveRecord, RouterReply
from planner_hooks.config import PolicyFile
from planner_hooks.observe import Observer
from planner_hooks.plan import HoldReason, Move, Plan
from planner_hooks.snapshot import ActiveMove, Capture, Snapshot

logger = logging.getLogger(__name__)
MOVES = Metric("dynamo_migrate_planner_moves", "Moves that policies planned", ["policy", "outcome"])
HOLDS = Metric("dynamo_migrate_planner_holds", "What policies left alone", ["policy", "reason"])


class Commands(Protocol):
    """What the controller needs of ``components.router.client.RouterClient``."""

    async def status(self) -> RouterReply:
        """Workers, streams and recent migrations."""
        ...

    async def migrate(self, request_id: str, worker: str, mode: Mode, source: str) -> MoveRecord:
        """Move one request."""
        ...

    async def drain(self, worker: str, timeout_s: float) -> list[MoveRecord]:
        """Empty a worker; it gets no new requests."""
        ...

    async def undrain(self, worker: str) -> None:
        """Give it requests again."""
        ...


class Outcome(msgspec.Struct, frozen=True):
    """What became of a planned move."""

    move: Move
    ok: bool
    reason: str = ""
    begun: bool = True
    """False when the request or a worker was not as planned any more, and nothing was done."""
    downtime_s: float = 0.0
    total_s: float = 0.0
    gap_before: float = 0.0
    """KV share in use at the source less that at the destination, when the move was planned."""
    gap_after: float | None = None
    """The same at the first decision after it: the gain that was really had."""


class Controller:
    """See the module docstring."""

    def __init__(
        self, policy: PolicyFile, commands: Commands, observer: Observer, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config = policy.controller
        self._policy = policy.build()
        self._commands = commands
        self._observer = observer
        self._clock = clock
        self._active: dict[str, ActiveMove] = {}
        self._backoff: dict[tuple[str, str], float] = {}
        self.retired: set[str] = set()
        """Workers that are to go by a policy's wish."""
        self.seen: Snapshot | None = None
        """What the last decision was made on."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self.outcomes: deque[Outcome] = deque(maxlen=self._config.history)
        self.ticks = 0

    async def tick(self) -> Plan:
        """One decision; its moves go on after this returns."""
        status = await self._commands.status()
        capture, self.seen, plan = await asyncio.to_thread(self._decide, status, tuple(self._active.values()))
        self._settle_gaps(capture)
        self.retired &= set(self.seen.worker_ids)
        self.ticks += 1
        for hold in plan.holds:
            HOLDS.labels(hold.policy, hold.reason).inc()
        for move in plan.moves:
            self._begin(move, _gap(capture, move))
        if not self._config.dry_run:
            new = set(plan.retire) - self.retired
            self.retired |= new
            self.retire(sorted(new))
        self.release(sorted(self.retired & set(plan.release)))
        self.retired -= set(plan.release)
        return plan

    def _decide(self, status: RouterReply, active: tuple[ActiveMove, ...]) -> tuple[Capture, Snapshot, Plan]:
        capture = self._observer.capture(status, active)
        seen = Snapshot.of(capture, self._config.limits.stale_after_s)
        return capture, seen, self._policy.plan(seen)

    def retire(self, workers: Iterable[str]) -> None:
        """Begin to empty workers; they get no new requests."""
        for worker in workers:
            if self._config.dry_run:
                logger.info("would empty worker %s", worker)
            else:
                self._spawn(self._drain(worker))

    def release(self, workers: Iterable[str]) -> None:
        """Give workers requests again."""
        for worker in workers:
            if not self._config.dry_run:
                self._spawn(self._undrain(worker))

    def _begin(self, move: Move, gap: float) -> None:
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
        self._spawn(self._carry_out(move, gap))

    async def _carry_out(self, move: Move, gap: float) -> None:
        try:
            record = await asyncio.wait_for(
                self._commands.migrate(move.request_id, move.dst, move.mode, move.src), self._config.migration_timeout_s
            )
            begun = record.ok or record.ended_at > 0  # A router that refuses at once sets no times.
            outcome = Outcome(move, record.ok, record.reason, begun, record.downtime_s, record.total_s, gap)
        except TimeoutError:
            outcome = Outcome(move, False, f"not over after {self._config.migration_timeout_s:g} s", gap_before=gap)
        except MigrateError as error:
            begun = not isinstance(error, RequestNotFound | NoRoom)
            outcome = Outcome(move, False, f"{error.code}: {error}", begun, gap_before=gap)
        finally:
            self._active.pop(move.request_id, None)
        self.outcomes.append(outcome)
        failed = "failed" if outcome.begun else HoldReason.WORLD_CHANGED
        MOVES.labels(move.policy, "done" if outcome.ok else failed).inc()
        if not outcome.ok:
            # The request may simply have ended: only its pair rests, and not for long.
            self._backoff[move.src, move.dst] = self._clock() + self._config.failure_backoff_s
            logger.info("request %s stayed on %s: %s", move.request_id, move.src, outcome.reason)

    async def _drain(self, worker: str) -> None:
        try:
            await self._commands.drain(worker, self._config.drain_timeout_s)
        except MigrateError as error:
            logger.warning("worker %s is not empty: %s", worker, error)

    async def _undrain(self, worker: str) -> None:
        try:
            await self._commands.undrain(worker)
        except MigrateError as error:
            logger.warning("worker %s is not taken back: %s", worker, error)

    def _settle_gaps(self, capture: Capture) -> None:
        for at, outcome in enumerate(self.outcomes):
            if outcome.ok and outcome.gap_after is None:
                self.outcomes[at] = msgspec.structs.replace(outcome, gap_after=_gap(capture, outcome.move))

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def summary(self) -> str:
        """One line for the log."""
        counts = Counter("done" if outcome.ok else "failed" for outcome in self.outcomes)
        return f"{self.ticks} decisions, {counts['done']} moves done, {counts['failed']} failed"

    async def idle(self) -> None:
        """Wait until nothing that was begun is under way."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    def close(self) -> None:
        """Let go of everything."""
        for task in self._tasks:
            task.cancel()


def _gap(capture: Capture, move: Move) -> float:
    share = {view.worker: view.held_tokens / max(1, view.capacity_tokens) for view in capture.workers}
    return share.get(move.src, 0.0) - share.get(move.dst, 0.0)
