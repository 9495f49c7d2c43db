# SPDX-License-Identifier: Apache-2.0
"""Workers and a frontend without a network: real engines and migration code, doubles of Dynamo's parts.

``Cluster.complete`` repeats requests like Dynamo 1.6.1's frontend (from observation): with the same id, the tokens so
far behind the prompt and fewer ``max_tokens``, to a worker that has not had the request; without one the request
fails. With prefill workers, each attempt passes one of them first. A dead worker stays in discovery for ``LEASE_S``.

``Cluster.at`` is called whenever a session passes one of the ``State``s; tests kill processes there.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import random
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from typing import Any

import msgspec

from components.engine.kv import RequestId
from components.engine.paged import PagedEngine, PagedOptions
from components.engine.protocol import FinishReason, GenerateOutput, GenerateRequest, Sampling
from components.errors import DeadlineExceeded, MigrateError, WorkerLost, from_code
from components.messages import pack, unpack
from components.migration.faces import PROTOCOL_FACE
from components.migration.legs import Leg
from components.migration.messages import Attached, Mode, MoveRecord, Owner, WorkerCall, WorkerOp, WorkerReply
from components.migration.options import Options
from components.migration.repeats import Repeat
from components.migration.requests import Requests
from components.transfer import TransferAgent
from components.worker.control import Control
from components.worker.state import WorkerStatus
from tests.direct import DirectEngine
from tests.fake_workers import Endpoint
from tests.paged import SMALL, new_engine
from tests.virtual import ASKED, FATAL_ITEM, GIVEN_UP_S, HANDLED_S, LEASE_S, OBEYED, Fate, State


class Node:
    """One worker process."""

    def __init__(self, cluster: Cluster, instance: int, role: str, **engine: Any) -> None:
        self.cluster = cluster
        self.instance = instance
        self.role = role
        self.name = f"node-{instance}"
        if engine.pop("direct", False):
            agents = engine.pop("agents", TransferAgent)
            agent = {"name": self.name, "namespace": cluster.name, "backends": ("local",)}
            options = PagedOptions(agent, **{**SMALL, **engine})
            self.engine: PagedEngine = DirectEngine(options, agents, self._reach)
        else:
            self.engine = new_engine(cluster.name, self.name, **engine)
        self.endpoint = Endpoint()
        self.alive = True
        self.died = asyncio.Event()
        self.died_at = 0.0

    def state(self, **facts: Any) -> None:
        """What it says of itself, from now on with these ``facts`` about its engine."""
        self.info = msgspec.structs.replace(self.info, **facts)
        self.status = WorkerStatus(self.requests, f"node-{self.instance}", self.role, self.info, self.endpoint)
        # The clock of this loop, also where its time is virtual.
        self.status.table.clock = asyncio.get_running_loop().time
        self.control = Control(self.requests, self.status)

    async def start(self) -> None:
        info = await self.engine.start()
        options = Options(orphan_s=self.cluster.orphan_s, relay_below=4)
        self.requests = Requests(self.engine, Wire(self), self.instance, info.fingerprint, options)
        self.info = info
        self.state()
        self.sweep = asyncio.ensure_future(self.requests.sweep())
        self.engine.freeze = self._passing(self.engine.freeze, State.FREEZE_ASKED, State.FROZEN)  # type: ignore[method-assign]
        self.engine.release = self._passing(self.engine.release, None, State.RELEASED)  # type: ignore[method-assign]
        self.engine.resume = self._passing(self.engine.resume, None, State.RESUMED)  # type: ignore[method-assign]

    def _reach(self, name: str) -> DirectEngine | None:
        """The engine of a living node, for a commit of this one."""
        node = next((node for node in self.cluster.nodes if node.name == name), None)
        here = node is not None and node.alive and self.alive
        return node.engine if here and node is not None and isinstance(node.engine, DirectEngine) else None

    def _passing(self, method: Callable[..., Any], before: State | None, after: State) -> Any:
        async def passing(engine_id: RequestId, *more: Any) -> Any:
            if before is not None:
                await self.cluster.pass_by(before, self.instance, self.cluster.heading.get(engine_id.split("~")[0], 0))
            result = await method(engine_id, *more)
            await self.cluster.pass_by(after, self.instance, self.cluster.heading.get(engine_id.split("~")[0], 0))
            return result

        return passing

    @property
    def listed(self) -> bool:
        """Is it in discovery?"""
        return self.alive or time.monotonic() - self.died_at < LEASE_S

    async def kill(self) -> None:
        """As kill -9: without any message."""
        if not self.alive:
            return
        self.alive = False
        self.died_at = time.monotonic()
        self.died.set()
        self.sweep.cancel()
        await self.engine.stop()

    async def prefill(self, request_id: RequestId) -> Owner | None:
        """Dynamo's handler of a prefill worker, which hands over nothing except a known owner."""
        await self.cluster.moment()
        if not self.alive:
            raise WorkerLost(f"node {self.instance} has died")
        return self.requests.owners.get(request_id)

    async def handle(
        self, request: GenerateRequest, attached: str = "", owner: Owner | None = None
    ) -> AsyncGenerator[GenerateOutput, None]:
        """Dynamo's handler."""
        if owner is not None:
            self.requests.owners.learn([(request.request_id, owner)])
        native = functools.partial(msgspec.msgpack.encode, request.sampling)
        limit = request.sampling.max_tokens
        repeated = self.requests.repeated(request.request_id, request.prompt_token_ids, native, limit)
        if repeated is None:
            leg = Leg(
                request.request_id,
                request.request_id,
                request.prompt_token_ids,
                native,
                attached=attached,
                max_tokens=limit,
            )
            outputs = self.requests.suspects.watched(self.engine.generate(request))
            repeated = self.requests.serve(leg, outputs, PROTOCOL_FACE)
        async with aclosing(repeated):
            async for output in repeated:
                yield output


class Wire:
    """``components.migration.peers.Peers`` of one node. Every call takes time; some answers get lost."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._cluster = node.cluster

    def instances(self) -> list[int]:
        return [node.instance for node in self._cluster.everybody if node.listed]

    def siblings(self) -> list[int]:
        return [node.instance for node in self._cluster.nodes if node.listed and node.endpoint.registered]

    def prefill_workers(self) -> list[int] | None:
        first = self._cluster.prefills
        return [node.instance for node in first if node.listed and node.endpoint.registered] if first else None

    async def call(self, instance: int, call: WorkerCall, timeout_s: float = 20.0) -> WorkerReply:
        self._alive()
        cluster, here = self._cluster, self._node.instance
        there = call.owners[0][1].instance if call.owners else instance
        if call.op is WorkerOp.RESERVE:
            cluster.heading[call.request_id] = instance
        node = cluster.reach(instance)
        fate = cluster.fate(call.op)
        await cluster.pass_by(ASKED.get(call.op), here, there)
        await cluster.moment()
        if fate is Fate.LATE:
            await asyncio.sleep(GIVEN_UP_S)
        if fate is Fate.KILL_CALLER:
            await self._node.kill()
        if fate is Fate.KILL_BEFORE:
            await node.kill()
        self._alive()
        if fate is Fate.GIVEN_UP:
            asyncio.ensure_future(self._late(node, call))
        if fate in (Fate.LOST, Fate.GIVEN_UP):
            await asyncio.sleep(min(timeout_s, GIVEN_UP_S))
            raise DeadlineExceeded(f"node {instance} did not answer {call.op}")
        reply: WorkerReply | None = None
        for _ in range(2 if fate is Fate.TWICE else 1):
            reply = await self._handled(node, call)
        await cluster.pass_by(OBEYED.get(call.op), here, there)
        await self._cluster.moment()
        if fate is Fate.KILL_AFTER:
            await node.kill()
        if fate is Fate.LOST_ANSWER:
            raise WorkerLost("the answer got lost")
        if reply is None or not (node.alive and self._node.alive):
            raise WorkerLost(f"node {instance} has died")
        if reply.error is not None:
            raise from_code(*reply.error)
        return reply

    async def _handled(self, node: Node, call: WorkerCall) -> WorkerReply | None:
        reply: WorkerReply | None = None
        async with aclosing(node.control.serve(pack(call))) as answers:
            async for item in answers:
                reply = unpack(item, WorkerReply)
        return reply

    async def _late(self, node: Node, call: WorkerCall) -> None:
        """It comes though its caller has given up, perhaps in the middle of the request's next life."""
        await asyncio.sleep(HANDLED_S)
        if node.alive:
            await self._handled(node, call)

    def _alive(self) -> None:
        if not self._node.alive:
            raise WorkerLost(f"node {self._node.instance} has died itself")

    async def attach(
        self, owner: Owner, request_id: RequestId, index: int, token_ids: tuple[int, ...] = ()
    ) -> AsyncGenerator[Attached, None]:
        node = self._cluster.reach(owner.instance)
        call = WorkerCall(WorkerOp.ATTACH, request_id, owner.life, index=index, tokens=token_ids)
        call = unpack(pack(call), WorkerCall)
        passes = [State.ATTACHED, State.FIRST_TOKEN, State.RELAYED] if index == -1 else []
        fate, count = self._cluster.fate(WorkerOp.ATTACH), 0
        async with aclosing(node.control.attach(call)) as items:
            async for item in until(items, node.died, self._node.died):
                if passes:
                    await self._cluster.pass_by(passes.pop(0), self._node.instance, owner.instance)
                    if not (node.alive and self._node.alive):
                        break
                yield unpack(pack(item), Attached)
                count += 1
                if fate is not Fate.NORMAL and count == FATAL_ITEM:
                    if fate is Fate.KILL_AFTER:
                        await node.kill()
                    raise WorkerLost(f"the stream of node {owner.instance} broke")
        self._alive()
        if not node.alive:
            raise WorkerLost(f"node {owner.instance} has died")


async def until(items: AsyncGenerator[Any, None], *ends: asyncio.Event) -> AsyncGenerator[Any, None]:
    """Items until one of the events: then whatever comes is lost."""
    waits = [asyncio.ensure_future(end.wait()) for end in ends]
    step: asyncio.Future[Any] | None = None
    try:
        while not any(end.is_set() for end in ends):
            step = asyncio.ensure_future(anext(items))
            await asyncio.wait((step, *waits), return_when=asyncio.FIRST_COMPLETED)
            if not step.done() or any(end.is_set() for end in ends):
                return
            try:
                yield step.result()
            except StopAsyncIteration:
                return
    finally:
        for wait in waits:
            wait.cancel()
        if step is not None:
            step.cancel()
            await asyncio.gather(step, return_exceptions=True)


class Cluster:
    """Nodes and frontends."""

    def __init__(self, name: str, seed: int, faults: dict[str, float] | None = None) -> None:
        self.name = name
        self.rng = random.Random(seed)
        self.nodes: list[Node] = []
        self.prefills: list[Node] = []
        self.orphan_s = 1.0
        self._faults = faults or {}
        self._ids = itertools.count()
        self.repeats = 0
        """Number of repeats that the frontend was told to make."""
        self.at: Callable[[State, int, int], None] = lambda state, source, destination: None
        self.heading: dict[str, int] = {}
        """Where a request moves to."""

    @property
    def everybody(self) -> list[Node]:
        return self.nodes + self.prefills

    async def start(self, count: int, prefills: int = 0, **engine: Any) -> None:
        for number in range(count + prefills):
            node = Node(self, number + 1, "decode" if number < count else "prefill", **engine)
            (self.nodes if number < count else self.prefills).append(node)
            await node.start()

    async def stop(self) -> None:
        for node in self.everybody:
            await node.kill()

    async def pass_by(self, state: State | None, source: int, destination: int) -> None:
        """A session passes a state. Victims are dead when this returns."""
        if state is not None:
            self.at(state, source, destination)
            await asyncio.sleep(0)

    def reach(self, instance: int) -> Node:
        for node in self.everybody:
            if node.instance == instance and node.alive:
                return node
        raise WorkerLost(f"node {instance} cannot be reached")

    def chance(self, fault: str) -> bool:
        return self.rng.random() < self._faults.get(fault, 0.0)

    def fate(self, op: WorkerOp) -> Fate:
        """Random fate of the next call. Explorations replace this."""
        calls = (Fate.TWICE, Fate.LOST_ANSWER) if op is not WorkerOp.ATTACH else ()
        return next((fate for fate in calls if self.chance(fate)), Fate.NORMAL)

    async def moment(self) -> None:
        """A call takes a while, sometimes a long one."""
        await asyncio.sleep(self.rng.random() * (0.05 if self.chance("late") else 0.001))

    async def _prefill(self, request_id: RequestId) -> Owner | None:
        """What a prefill worker says of the request. Raises ``WorkerLost`` when there is none."""
        tried: set[int] = set()
        while free := [n for n in self.prefills if n.alive and n.instance not in tried]:
            node = self.rng.choice(free)
            tried.add(node.instance)
            with suppress(WorkerLost):
                return await node.prefill(request_id)
        raise WorkerLost(f"{request_id}: no prefill worker")

    async def complete(
        self, prompt: tuple[int, ...], sampling: Sampling, attached: str = "", tokens: list[int] | None = None
    ) -> list[int]:
        """One request of a client through the frontend. Raises ``WorkerLost`` when no worker is left.

        ``tokens`` gets the client's tokens, also when this raises.
        """
        request_id = RequestId(f"request-{next(self._ids)}")
        tokens = [] if tokens is None else tokens
        tried: set[int] = set()
        most = sampling.max_tokens or 0
        source = 0
        while True:
            owner = await self._prefill(request_id) if self.prefills else None
            free = [n for n in self.nodes if n.alive and n.endpoint.registered and n.instance not in tried]
            if not free:
                raise WorkerLost(f"{request_id}: no untried eligible worker remains")
            node = self.rng.choice(free)
            tried.add(node.instance)
            left = msgspec.structs.replace(sampling, max_tokens=most - len(tokens))
            request = GenerateRequest(request_id, (*prompt, *tokens), left)
            heir = self.heading.get(request_id, 0)
            repeated = State.ADOPTED if heir == node.instance else State.PASSED_ON
            stream = node.handle(request, attached, owner)
            try:
                async with aclosing(stream):
                    async for output in until(stream, node.died):
                        tokens.extend(output.token_ids)
                        if output.error is not None:
                            if output.error[0] != WorkerLost.code:
                                raise from_code(*output.error)
                            # Dynamo's worker ends its process when its engine has died.
                            await node.kill()
                        if output.finish_reason is FinishReason.CANCELLED:
                            raise MigrateError(f"{request_id}: node {node.instance} cancelled it")
                        if output.finish_reason is not None and output.error is None:
                            return tokens
                        if source:
                            await self.pass_by(repeated, source, heir)
                            source = 0
            except Repeat:
                self.repeats += 1
                source = node.instance
                await self.pass_by(State.REPEATED, source, self.heading.get(request_id, 0))
                continue
            except WorkerLost:
                # Asked after its engine's death: the same.
                await node.kill()
                continue
            source = 0
            if node.alive:
                raise MigrateError(f"{request_id}: the stream of node {node.instance} just ended")

    async def move(self, mode: Mode = Mode.LIVE) -> MoveRecord | None:
        """Move any request to any other node."""
        alive = [node for node in self.nodes if node.alive]
        here = [(node, leg) for node in alive for leg in node.status.running()]
        if not here or len(alive) < 2:
            return None
        node, leg = self.rng.choice(here)
        target = self.rng.choice([other for other in alive if other is not node]).instance
        call = WorkerCall(WorkerOp.MIGRATE, leg.request_id, target=target, mode=mode)
        with suppress(MigrateError):
            return await node.status.move(call)
        return None

    async def quiet(self) -> None:
        """Wait until all engines are idle; raise ``SessionError`` when blocks do not add up."""
        for _ in range(1500):
            alive = [node for node in self.everybody if node.alive]
            if not any([(await node.engine.report())[1] for node in alive]):
                break
            await asyncio.sleep(0.02)
        for node in alive:
            await node.engine.check_integrity()
            stats = (await node.engine.report())[0]
            assert stats.free_blocks == stats.total_blocks, (await node.engine.report())[1]
            assert not node.requests.legs
