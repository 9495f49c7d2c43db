# SPDX-License-Identifier: Apache-2.0
"""A worker's state: load and requests, cordon and drain, moves to other workers.

Cordoned: the worker is not in Dynamo's discovery, so that frontends give it nothing new, and it refuses arrivals.
Draining: cordoned, and its requests move to workers of the same role with room; requests without room elsewhere go on
decoding here and are tried again with back-off. Both are the worker's own state; no other process keeps them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry

from components.engine.kv import RequestId
from components.engine.protocol import EngineInfo
from components.errors import MigrateError, NoRoom, NotMigratable, Refused, RequestNotFound
from components.metrics import spans
from components.metrics.worker import Gauges, WorkerMetrics
from components.migration.legs import Arrival, Leg
from components.migration.messages import Counts, Mode, MoveRecord, WorkerCall, WorkerState
from components.migration.peers import Peers, states_of
from components.migration.requests import Requests
from components.migration.session import Limits, migrate, room_tokens
from components.transfer.ids import Epoch
from components.worker import weights
from components.worker.report import Report, lives, relays

logger = logging.getLogger(__name__)
_RECORDS = 64
"""Number of past moves kept for people and planners."""
_DISCOVERY_S = 5.0
"""Longest wait of a leaving worker for etcd."""
_BACK_OFF_S, _LONGEST_BACK_OFF_S = 0.25, 5.0
_AT_ONCE = 256
"""Concurrent moves from one worker; fewer are frozen (``Requests.cut_over``)."""


@dataclass(frozen=True)
class _Room:
    """Room at another worker."""

    blocks: int
    seats: int


class WorkerStatus:
    """See the module docstring."""

    def __init__(
        self, requests: Requests, name: str, role: str, info: EngineInfo, endpoint: Any, metrics: str = ""
    ) -> None:
        self.requests = requests
        self._info = info
        self._name = name
        self._role = role
        self._endpoint = endpoint
        self._metrics = metrics
        shown = tuple(msgspec.structs.replace(agent, epoch=Epoch(agent.epoch[:8])) for agent in info.agents)
        self._shown = msgspec.structs.replace(info, agents=shown)
        """With shortened epochs: without a secret the whole epoch opens an agent's sockets."""
        self._shown_until = 0
        """Callers that know no later version of the table are told it."""
        self._limits = Limits(lease_s=info.lease_s)
        self.table = Report(requests)
        self._moves: deque[tuple[float, MoveRecord]] = deque(maxlen=_RECORDS)
        self._moved = 0
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._drain_until = 0.0
        self._emptying: asyncio.Task[None] | None = None
        self._emptied: list[MoveRecord] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._counted = WorkerMetrics(self._gauges, self._wake)
        self.cordoned = False
        self.paused = False
        """By Dynamo's control routes."""
        self.draining = False

    def become(self, fingerprint: str) -> None:
        """The engine is no longer what it was at its start (``controls``)."""
        self.requests.arrivals.fingerprint = fingerprint
        self._info = msgspec.structs.replace(self._info, fingerprint=fingerprint)
        self._shown = msgspec.structs.replace(self._shown, fingerprint=fingerprint)
        self._shown_until = self.table.version

    def admit(self) -> None:
        """Raise ``Refused`` unless a request may arrive from another worker."""
        if self.cordoned:
            raise Refused(f"worker {self._name} is cordoned: it takes no requests in")
        if self.paused:
            raise Refused(f"worker {self._name} is paused (pause_generation or sleep): it takes no requests in")

    async def report(self, call: WorkerCall) -> WorkerState:
        """The worker's state, or its changes for a caller with a version."""
        report = self.table
        stats = await report.refresh()
        page = report.page(call.since, call.after) if call.requests else None
        now = time.monotonic()
        told = min(self._moved - call.moves_since, len(self._moves)) if call.requests and not call.after else 0
        return WorkerState(
            worker=self._name,
            role=self._role,
            stats=stats,
            info=self._shown if call.since <= self._shown_until else None,
            version=report.version,
            whole=page is not None and page.whole,
            rows=page.rows if page is not None else (),
            counts=page.counts if page is not None else Counts(),
            gone=page.gone if page is not None else (),
            next=page.next if page is not None else 0,
            age_s=report.age_s(),
            moves=tuple(
                msgspec.structs.replace(record, age_s=now - at)
                for at, record in list(self._moves)[len(self._moves) - max(0, told) :]
            ),
            moves_total=self._moved,
            cordoned=self.cordoned or self.paused,
            draining=self.draining,
            tokens_total=self.requests.tokens_total,
            handoffs=dict(self.requests.handoffs),
            metrics=self._metrics,
        )

    def running(self) -> list[Leg]:
        """Lives in this worker's engine, running or waiting."""
        return [
            leg
            for leg in lives(self.requests)
            if leg.away is None and not leg.over and (not isinstance(leg, Arrival) or leg.committed)
        ]

    def metrics(self) -> CollectorRegistry:
        """Update the gauges, on the loop; another thread reads them."""
        self._loop = asyncio.get_running_loop()
        return self._counted.registry

    def _gauges(self) -> Gauges:
        return Gauges(self.table.stats, self._relays(), self.cordoned, self.requests.events, self.requests.handoffs)

    def _wake(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(lambda: self.requests.spawn(self.table.refresh()))

    @property
    def left(self) -> int:
        """Number of requests in this worker's engine, running or waiting."""
        return len(self.running())

    # Moves

    async def move(self, call: WorkerCall) -> MoveRecord:
        """Move one request, to the call's worker or to the one with most room."""
        leg = next((leg for leg in self.running() if leg.request_id == call.request_id), None)
        if leg is None or call.life not in (0, leg.life):
            raise RequestNotFound(f"request {call.request_id} does not run on worker {self._name}")
        target = call.target
        if not target:
            room = await self._peers()
            if not room:
                raise NoRoom("no other worker of this role and model takes requests")
            target = max(room, key=lambda instance: (room[instance].seats > 0, room[instance].blocks))
        return await self._move(leg, target, call.mode)

    async def _move(self, leg: Leg, target: int, mode: Mode) -> MoveRecord:
        async with self._slots:
            record = await migrate(self.requests, leg, target, mode, self._limits)
        self.note(record, mode)
        spans.export(record, leg.trace)
        return record

    def note(self, record: MoveRecord, asked: Mode) -> None:
        """Note an ended move; ``asked`` is the requested mode."""
        self._counted.moved(record, asked)
        self._moves.append((time.monotonic(), record))
        self._moved += 1

    async def _peers(self) -> dict[int, _Room]:
        """Room at possible destinations; a worker that does not answer in time has none."""
        peers = self.requests.peers
        others = [i for i in peers.instances() if i != self.requests.instance]
        found: dict[int, _Room] = {}
        for instance, state in (await states_of(peers, others)).items():
            info, stats = state.info, state.stats
            if (
                not state.cordoned
                and info is not None
                and info.fingerprint == self._info.fingerprint
                and state.role == self._role
            ):
                taken = stats.running + stats.waiting + stats.frozen + stats.landing
                found[instance] = _Room(stats.free_blocks, info.max_num_seqs - taken)
        return found

    # Cordon and drain

    async def cordon(self) -> None:
        """Stop taking new requests. Idempotent."""
        if not self.cordoned:
            self.cordoned = True
            try:
                async with asyncio.timeout(_DISCOVERY_S):
                    await self._endpoint.unregister_endpoint_instance()
            except TimeoutError:
                logger.warning(
                    "worker %s: discovery has not answered within %g s: frontends may still send requests",
                    self._name,
                    _DISCOVERY_S,
                )

    async def uncordon(self) -> None:
        """Take requests again; ends a drain."""
        self.draining, self._drain_until = False, 0.0
        if self.cordoned:
            self.cordoned = False
            await self._endpoint.register_endpoint_instance()

    @property
    def kin(self) -> tuple[Peers, int, EngineInfo]:
        """Arguments of ``weights``: peers and this worker."""
        return self.requests.peers, self.requests.instance, self._info

    async def give_way(self) -> None:
        """Two workers with different weights that started together have not seen each other: cordon one."""
        if any(other < self.requests.instance for other in await weights.with_others(*self.kin)):
            await self.cordon()
            await weights.until_alone(*self.kin)
            await self.uncordon()

    async def drain(self, timeout_s: float) -> tuple[MoveRecord, ...]:
        """Cordon, and move everything away, for ``timeout_s`` at most. Returns the ended moves.

        The drain goes on when the caller disconnects. A second call waits for the same drain and can lengthen it.
        """
        await self.cordon()
        self.draining = True
        self._drain_until = max(self._drain_until, time.monotonic() + timeout_s)
        if self._emptying is None or self._emptying.done():
            self._emptied = []
            self._emptying = asyncio.ensure_future(self._empty())
        await asyncio.wait((self._emptying,), timeout=timeout_s)
        if self._emptying.done():
            self._emptying.result()
        return tuple(self._emptied)

    async def _empty(self) -> None:
        stays: set[RequestId] = set()
        begun, wait = time.monotonic(), _BACK_OFF_S
        while self.draining and (rest := self._drain_until - time.monotonic()) > 0 and self.running():
            plan = await self._plan([leg for leg in self.running() if leg.request_id not in stays and not leg.fixed])
            moved = await asyncio.gather(*(self._move(leg, target, Mode.LIVE) for leg, target in plan))
            self._emptied += moved
            stays |= {RequestId(r.request_id) for r in moved if r.code == NotMigratable.code}
            wait = _BACK_OFF_S if any(r.ok for r in moved) else min(2 * wait, _LONGEST_BACK_OFF_S)
            if self.running():
                await asyncio.sleep(min(wait, rest))
        took = time.monotonic() - begun
        self._counted.drained(took, done=not self.left)
        if left := self.left:
            logger.warning("worker %s: %d requests are left after %g s", self._name, left, took)

    async def _plan(self, legs: list[Leg]) -> list[tuple[Leg, int]]:
        """A destination for each request that fits somewhere; moves without room are not tried."""
        if not legs:
            return []
        rooms, size = await self._peers(), self._info.block_size
        plan = []
        for leg in legs:
            # In models with several groups of layers a request has more blocks than its tokens need in one group.
            needed = max(-(-room_tokens(leg, size) // size), self.table.blocks_of(leg.engine_id)) + 1
            free = {instance: room for instance, room in rooms.items() if room.seats > 0 and room.blocks >= needed}
            if not free:
                continue
            target = max(free, key=lambda instance: free[instance].blocks)
            rooms[target] = _Room(free[target].blocks - needed, free[target].seats - 1)
            plan.append((leg, target))
        return plan

    async def leave(self, grace_s: float) -> None:
        """Before the process ends: drain, then wait for relays that the frontend does not repeat."""
        end = time.monotonic() + grace_s
        try:
            await self.drain(grace_s)
        except MigrateError as error:
            logger.warning("drain: %s", error)
        self.requests.closing = True
        while time.monotonic() < end and (passed_on := self._relays()):
            logger.info(
                "worker %s passes on %d requests for %.0f s at most", self._name, passed_on, end - time.monotonic()
            )
            await asyncio.sleep(0.25)

    def _relays(self) -> int:
        return sum(relays(leg) for leg in list(self.requests.legs.values()))
