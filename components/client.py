# SPDX-License-Identifier: Apache-2.0
"""Client of all workers of a namespace: state, migrate, drain, undrain. For command line and planner.

It asks all workers in parallel, each with its own deadline, for their changes since the last time. A worker that does
not answer is shown as missing. There is no server between: every call goes to the worker that it concerns, and a
request's own worker moves it.

Life cycle: ``connect`` once; ``refresh`` any number of times; ``status`` returns the known state without a call.
``close`` ends running calls. Errors: ``WorkerLost``, ``DeadlineExceeded`` and the worker's errors;
``RequestNotFound`` and ``WorkerNotFound`` for names that fit none or several. Threading: one asyncio loop.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from typing import Any, Self

import msgspec

from components import env
from components.engine.kv import RequestId
from components.errors import MigrateError, RequestNotFound, WorkerLost, WorkerNotFound
from components.messages import pack, unpack
from components.migration.messages import (
    Decision,
    Mode,
    MoveRecord,
    PlannerReply,
    RequestRow,
    WorkerCall,
    WorkerOp,
)
from components.migration.peers import Peers, short
from components.status import Status, Told, WorkerReport

DECISIONS = "migration_planner.decisions"
"""Endpoint of a planner with its last decisions."""
_STATUS_S = 2.0
_MOVE_S = 120.0
_MOVES = 1024
_AT_ONCE = 128
"""Workers asked at once; deadlines of further ones begin later."""
_SETTLED_S = 0.2
_TABLE_S = 1.0
"""Greatest age of a worker's table."""


Planners = Callable[[], Awaitable[list[Decision]]]
"""Asks all planners for their decisions."""


class Drained(msgspec.Struct, frozen=True):
    """Result of a drain."""

    worker: str
    left: int
    """Requests that still run there."""
    moves: tuple[MoveRecord, ...]
    """All attempts."""


class Workers:
    """See the module docstring."""

    def __init__(
        self,
        peers: Peers,
        planners: Planners | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._peers = peers
        self._planners = planners
        self._clock = clock
        self._told: dict[int, Told] = {}
        self._short: dict[str, int] = {}
        """Instances by whole short names that only they have."""
        self._asking: dict[int, asyncio.Task[None]] = {}
        self._late: set[int] = set()
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._moves: deque[tuple[float, MoveRecord]] = deque(maxlen=_MOVES)
        self._decisions: tuple[Decision, ...] = ()

    @classmethod
    async def connect(cls, runtime: Any, namespace: str, wait_s: float = 10.0) -> Self:
        """Find the workers. Raises ``WorkerLost`` when there are none within ``wait_s``."""
        peers = await Peers.connect(runtime, namespace, list(env.COMPONENTS.read()))
        planners = await runtime.endpoint(f"{namespace}.{DECISIONS}").client()
        end = time.monotonic() + wait_s
        found: list[int] = []
        # Discovery finds one worker after the other.
        while not found or found != peers.instances():
            if not found and time.monotonic() > end:
                raise WorkerLost(
                    f"no worker of namespace {namespace} is in Dynamo's discovery: is the graph running, and are "
                    "DYN_NAMESPACE and ETCD_ENDPOINTS those it was started with?"
                )
            found = peers.instances()
            await asyncio.sleep(_SETTLED_S)
        return cls(peers, functools.partial(_decisions, planners))

    # What is known

    def follow(self, worker: str) -> Told:
        """What keeps the state of a worker that is new in discovery."""
        return Told(worker)

    async def refresh(self, patience_s: float = _STATUS_S, decisions: bool = False) -> None:
        """Ask every worker for its changes; return after all answers, after ``patience_s`` at most.

        Does not wait for workers that were late the last time: a hanging worker delays one call, and its answer counts
        when it arrives. Never raises.
        """
        there = self._peers.instances()
        if there != list(self._told):
            self._told = {i: self._told.get(i) or self.follow(short(i)) for i in there}
            self._late.intersection_update(there)
            shared = Counter(map(short, there))
            self._short = {short(i): i for i in there if shared[short(i)] == 1}
        for instance in there:
            if instance not in self._asking:
                self._asking[instance] = asyncio.ensure_future(self._ask(instance, self._told[instance]))
        waited = {task for instance, task in self._asking.items() if instance not in self._late}
        if decisions and self._planners is not None:
            waited.add(asyncio.ensure_future(self._ask_planners(self._planners)))
        if waited:
            await asyncio.wait(waited, timeout=patience_s)
        self._late = set(self._asking)
        for instance in self._late:
            if instance in self._told:
                self._told[instance].missing = f"no answer within {patience_s:g} s"

    async def _ask(self, instance: int, told: Told) -> None:
        try:
            after, version, moves = 0, told.version, told.moves_total
            while True:
                call = WorkerCall(WorkerOp.STATUS, since=version, moves_since=moves, after=after)
                async with self._slots:
                    state = (await self._peers.call(instance, call, _STATUS_S)).state
                if state is None:
                    raise WorkerLost(f"worker {told.worker} answered without its state")
                now = self._clock()
                told.take(state, now, first=not after)
                self._moves.extend((now - move.age_s, move) for move in state.moves)
                after = state.next
                if not after:
                    return
        except MigrateError as error:
            told.missing = f"{error.code}: {error}"
        finally:
            self._asking.pop(instance, None)

    async def _ask_planners(self, planners: Planners) -> None:
        self._decisions = tuple(await planners())

    def status(self, ages: bool = True) -> Status:
        """The known state. Without ``ages``, requests have the ages of their first report."""
        now = self._clock()
        reports = (told.report(now, ages) for _, told in sorted(self._told.items()))
        return Status(tuple(reports), self.moves(), self._decisions)

    def moves(self) -> tuple[MoveRecord, ...]:
        """The last moves, in the order of their ends."""
        now = self._clock()
        moves = sorted(self._moves, key=lambda pair: pair[0])
        return tuple(msgspec.structs.replace(move, age_s=now - at) for at, move in moves)

    # Names

    def worker(self, name: str) -> WorkerReport:
        """The only worker with this begin of its id. Raises ``WorkerNotFound``."""
        return self._told[self._named(name)].report(self._clock(), True)

    def _named(self, name: str) -> int:
        if (known := self._short.get(name)) is not None:
            return known
        # Also accepts a whole instance id, as in Dynamo's logs.
        ids = {i: told.worker if len(name) <= len(told.worker) else f"{i:016x}" for i, told in self._told.items()}
        found = [instance for instance, text in ids.items() if name and text.startswith(name.lower())]
        if len(found) != 1:
            among = ", ".join(sorted(self._told[i].worker for i in found or ids)) or "none"
            raise WorkerNotFound(f"{len(found) or 'no'} workers begin with {name!r}; workers: {among}")
        return found[0]

    def request(self, name: str) -> tuple[WorkerReport, RequestRow]:
        """The only running request with this begin of its id, and its worker. Raises ``RequestNotFound``."""
        running = list(self.status().requests())
        found = [pair for pair in running if pair[1].request_id.startswith(name)]
        found = [pair for pair in found if pair[1].request_id == name] or found
        if len({row.request_id for _, row in found}) != 1:
            among = ", ".join(sorted({row.request_id for _, row in found or running})[:5]) or "none"
            raise RequestNotFound(
                f"{len(found) or 'no'} running requests begin with {name!r}: dynamo status; running: {among}"
            )
        # When two workers list it, the younger table is right.
        return min(found, key=lambda pair: pair[0].age_s)

    # What workers are asked to do

    async def migrate(
        self, request_id: str, source: str, target: str = "", mode: Mode = Mode.LIVE, life: int = 0
    ) -> MoveRecord:
        """Move a request from ``source``; without ``target`` to the worker with most room.

        Raises ``RequestNotFound`` when the request, or this life of it, is no longer there.
        """
        instance = self._named(source)
        there = self._named(target) if target else 0
        call = WorkerCall(WorkerOp.MIGRATE, RequestId(request_id), life, target=there, mode=mode)
        reply = await self._peers.call(instance, call, _MOVE_S)
        if not reply.moves:
            raise WorkerLost(f"worker {source} answered without the move's record")
        return reply.moves[0]

    async def move(self, request: str, to: str = "", mode: Mode = Mode.LIVE) -> MoveRecord:
        """``migrate``, for people: finds the request's worker, once more if it has just moved."""
        source, row = self.request(request)
        try:
            return await self.migrate(row.request_id, source.worker, to, mode, row.life)
        except RequestNotFound:
            await asyncio.sleep(_TABLE_S)
            await self.refresh()
            source, row = self.request(row.request_id)
            return await self.migrate(row.request_id, source.worker, to, mode, row.life)

    async def drain(self, worker: str, timeout_s: float = 60.0) -> Drained:
        """Empty a worker, within ``timeout_s``; it gets no new requests until ``undrain``."""
        instance = self._named(worker)
        call = WorkerCall(WorkerOp.DRAIN, timeout_s=timeout_s)
        reply = await self._peers.call(instance, call, timeout_s + _MOVE_S)
        return Drained(short(instance), reply.left, reply.moves)

    async def undrain(self, worker: str) -> None:
        """Give a worker requests again."""
        await self._peers.call(self._named(worker), WorkerCall(WorkerOp.UNDRAIN))

    async def check(self, worker: str) -> None:
        """Raise ``SessionError`` when blocks and requests of a worker do not add up."""
        await self._peers.call(self._named(worker), WorkerCall(WorkerOp.CHECK))

    def close(self) -> None:
        """End running calls."""
        for task in self._asking.values():
            task.cancel()


async def _decisions(planners: Any) -> list[Decision]:
    """Decisions of all planners of an endpoint's client. One that does not answer has none."""

    async def of(instance: int) -> tuple[Decision, ...]:
        try:
            async with asyncio.timeout(_STATUS_S):
                async for item in await planners.direct(pack(PlannerReply(())), instance, annotated=False):
                    return unpack(item, PlannerReply).decisions
        except Exception:
            # Dynamo raises plain exceptions; missing decisions are not worth an error.
            return ()
        return ()

    found = await asyncio.gather(*map(of, planners.instance_ids()))
    return [decision for each in found for decision in each]
