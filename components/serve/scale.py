# SPDX-License-Identifier: Apache-2.0
"""Carries out the numbers of workers that Dynamo's planner decides (``environment: virtual``).

Life cycle: ``run`` until cancelled. Each round compares the last decision with the existing processes, and starts or
stops one; it acknowledges a decision when both agree, and only then the planner decides again. A decision holds until
the next one: a worker that has ended for good is started again. Decisions from before the start of the graph are
acknowledged but not carried out.

Stopping loses nothing: the worker that is cheapest to empty is drained before SIGTERM, and requests without room
elsewhere go on decoding there meanwhile. No worker is stopped while another one of its role is not ready, or before
any of them answers.
Threading: one asyncio loop. Errors: a worker that cannot be started or drained is reported and tried again later;
nothing here ends the graph.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

from components import process
from components.client import Workers
from components.errors import MigrateError
from components.serve.child import Child
from components.serve.plan import Plan, Process
from components.serve.supervisor import READY_S, Supervisor
from components.status import WorkerReport

logger = logging.getLogger(__name__)
POLL_S = 0.5
_RETRY_S = 30.0
_DRAIN_S = 300.0


Decided = tuple[int, int, int]
"""Id, prefill workers, decode workers."""


class Scaler:
    """See the module docstring. ``decisions``: Dynamo's ``VirtualConnectorClient``."""

    def __init__(
        self, plan: Plan, supervisor: Supervisor, decisions: Any, connect: Callable[[], Awaitable[Workers]]
    ) -> None:
        self._bounds = plan.bounds
        self._known = [p for p in [*plan.processes, *plan.spare] if p.role]
        self._supervisor = supervisor
        self._decisions = decisions
        self._connect = connect
        self._workers: Workers | None = None
        """Known from the first stop on: workers start after the scaler."""
        self._before: Decided | None = None
        self._acknowledged: Decided | None = None
        self._retry_at = 0.0

    async def run(self) -> None:
        """Follow decisions until cancelled."""
        first = await self._decisions.get()
        if first.decision_id >= 0:
            await self._decisions.complete(first)
            self._before = _decided(first)
        while True:
            await asyncio.sleep(POLL_S)
            try:
                await self.follow()
            except MigrateError as error:
                logger.warning("number of workers: %s", error)
                await asyncio.sleep(POLL_S)
            except Exception:
                # Dynamo's client raises exceptions of any class; the graph must go on.
                logger.exception("number of workers")
                await asyncio.sleep(_RETRY_S)

    async def follow(self) -> None:
        """One round."""
        decision = await self._decisions.get()
        # The id is written after the numbers: a negative one means that some are missing.
        # A restarted planner counts from 0 again, so the id alone does not identify a decision.
        decided = _decided(decision)
        if decision.decision_id < 0 or decided == self._before:
            return
        wanted = {"decode": decision.num_decode_workers, "prefill": decision.num_prefill_workers}
        for role, (low, high) in self._bounds.items():
            if wanted[role] >= 0 and not await self._agree(role, min(max(wanted[role], low), high)):
                return
        if decided != self._acknowledged:
            await self._decisions.complete(decision)
            self._acknowledged = decided

    def _running(self, role: str) -> list[Child]:
        return [child for child in self._supervisor.children if child.process.role == role]

    async def _agree(self, role: str, wanted: int) -> bool:
        running = self._running(role)
        if len(running) < wanted:
            await self._start_one(role, running)
        elif len(running) > wanted and _all_ready(running):
            await self._stop_one(role, running)
        running = self._running(role)
        return len(running) == wanted and _all_ready(running)

    async def _start_one(self, role: str, running: list[Child]) -> None:
        if time.monotonic() < self._retry_at:
            return
        self._retry_at = time.monotonic() + _RETRY_S
        taken = {(child.process.component, child.process.replica) for child in running}
        free = [p for p in self._known if p.role == role and (p.component, p.replica) not in taken]
        child = await self._supervisor.add(free[0])
        if await self._supervisor.serves(child):
            self._retry_at = 0.0
        elif child in self._supervisor.children:
            logger.warning("%s is not ready within %g s; going on without it", child.label, READY_S)
            await self._supervisor.remove(child)

    async def _stop_one(self, role: str, running: list[Child]) -> None:
        workers = self._workers = self._workers or await self._connect()
        await workers.refresh()
        names = {worker_name(child.process): child for child in running}
        # With tensor parallelism each rank has an agent, with the rank at the end of its name.
        found = [
            (w, names[agent])
            for w in workers.status().workers
            if w.info is not None and not w.missing
            for agent in {a.name.split("-tp")[0] for a in w.info.agents}
            if agent in names
        ]
        if not found:
            return  # New workers will answer in the next rounds.
        worker, child = min(found, key=lambda pair: _emptying(pair[0]))
        if role == "decode":
            await workers.drain(worker.worker, _DRAIN_S)
        logger.info("stopping worker %s (%s)", worker.worker, child.label)
        await self._supervisor.remove(child)


def _decided(decision: Any) -> Decided:
    return decision.decision_id, decision.num_prefill_workers, decision.num_decode_workers


def _all_ready(children: list[Child]) -> bool:
    return all(child.alive and child.ready_file.exists() for child in children)


def worker_name(worker: Process) -> str:
    """Name of a worker's agent, as in ``components.worker.settings``."""
    return f"{socket.gethostname()}-{worker.component}-{worker.replica}"


def _emptying(worker: WorkerReport) -> tuple[bool, int, int]:
    """Order of stopping: leaving workers first, then by requests that cannot move, then by KV blocks."""
    stats = worker.stats
    stuck = sum(bool(row.not_migratable) for row in worker.here())
    return not worker.draining, stuck, stats.total_blocks - stats.free_blocks if stats else 0


async def connected(plan: Plan, supervisor: Supervisor) -> Scaler:
    """A scaler on Dynamo's runtime; ``ETCD_ENDPOINTS`` must be set in this process."""
    from dynamo._core import VirtualConnectorClient

    runtime = process.connect()
    decisions = VirtualConnectorClient(runtime, plan.namespace)
    return Scaler(plan, supervisor, decisions, lambda: Workers.connect(runtime, plan.namespace))
