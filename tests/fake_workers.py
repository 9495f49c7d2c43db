# SPDX-License-Identifier: Apache-2.0
"""Workers without engines, in one process, that answer real messages: for tests of their clients.

Each has a worker's real state and control endpoint, over an engine with the load and table that a test sets.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from components.engine.kv import RequestId
from components.engine.protocol import EngineInfo, EngineStats, RequestInfo, RequestPhase
from components.errors import DeadlineExceeded, RequestNotFound, WorkerLost, from_code
from components.messages import pack, unpack
from components.migration.messages import Attached, MoveRecord, Owner, WorkerCall, WorkerReply
from components.migration.options import Options
from components.migration.peers import short
from components.migration.requests import Requests
from components.transfer.ids import AgentName, AgentRef, Epoch
from components.worker.control import Control
from components.worker.state import WorkerStatus

INFO = EngineInfo("m", "same", 16, 100, 4096, 16, 2048, (AgentRef(AgentName("agent"), Epoch("0123456789abcdef")),))


def info_of(name: str, output: int = 50, **more: Any) -> RequestInfo:
    """A row of the engine's table."""
    fields: dict[str, Any] = {"phase": RequestPhase.DECODE, "kv_blocks": 10, "age_s": 1.0, "max_tokens": 1000} | more
    return RequestInfo(RequestId(name), prompt_tokens=100, output_tokens=output, **fields)


class Endpoint:
    """Dynamo's discovery of the worker."""

    def __init__(self) -> None:
        self.registered = True

    async def unregister_endpoint_instance(self) -> None:
        self.registered = False

    async def register_endpoint_instance(self) -> None:
        self.registered = True


@dataclass
class ToldEngine:
    """``report`` returns the test's values."""

    table: list[RequestInfo] = field(default_factory=list)
    reports: int = 0
    stuck: bool = False

    async def report(self) -> tuple[EngineStats, list[RequestInfo]]:
        self.reports += 1
        if self.stuck:
            await asyncio.Event().wait()
        held = sum(row.kv_blocks for row in self.table)
        return EngineStats(len(self.table), 0, 0, 0, 100 - held, 100, step_s=0.05), list(self.table)

    async def check_integrity(self) -> None:
        """All is well."""


class Status(WorkerStatus):
    """The real one; a move changes two tables and is over."""

    cluster: Workers
    instance: int
    answer: MoveRecord | None = None

    async def move(self, call: WorkerCall) -> MoveRecord:
        source = self.cluster.engines[self.instance]
        row = next((row for row in source.table if row.request_id == call.request_id), None)
        if row is None:
            raise RequestNotFound(f"request {call.request_id} does not run on worker {short(self.instance)}")
        if self.answer is not None:
            return self.answer
        target = call.target or next(i for i in self.cluster.engines if i != self.instance)
        source.table.remove(row)
        self.cluster.engines[target].table.append(row)
        record = MoveRecord(row.request_id, short(self.instance), short(target), call.mode, ok=True, downtime_s=0.02)
        self.note(record, call.mode)
        return record


class Workers:
    """``Peers`` of ``count`` workers, numbered from 1 on."""

    def __init__(self, count: int = 2, role: str = "decode") -> None:
        self.engines: dict[int, ToldEngine] = {}
        self.states: dict[int, Status] = {}
        self.endpoints: dict[int, Endpoint] = {}
        self._controls: dict[int, Control] = {}
        self.silent: set[int] = set()
        """Workers that do not answer."""
        self.lost: set[int] = set()
        """Dead workers that are still in discovery."""
        self.calls: list[tuple[int, WorkerCall]] = []
        self.bytes = 0
        for instance in range(1, count + 1):
            self.add(instance, role)

    def add(self, instance: int, role: str = "decode") -> ToldEngine:
        """One more."""
        engine, endpoint = ToldEngine(), Endpoint()
        requests = Requests(engine, self, instance, INFO.fingerprint, Options())  # type: ignore[arg-type]
        state = Status(requests, short(instance), role, INFO, endpoint, f"127.0.0.1:{9000 + instance}")
        state.cluster, state.instance = self, instance
        self.engines[instance], self.states[instance], self.endpoints[instance] = engine, state, endpoint
        self._controls[instance] = Control(requests, state)
        return engine

    def remove(self, instance: int) -> None:
        """It has left discovery."""
        del self.engines[instance], self._controls[instance]

    def instances(self) -> list[int]:
        return sorted(self.engines)

    siblings = instances

    def prefill_workers(self) -> None:
        return None

    async def call(self, instance: int, call: WorkerCall, timeout_s: float = 20.0) -> WorkerReply:
        self.calls.append((instance, call))
        if instance in self.lost:
            raise WorkerLost(f"worker {short(instance)}: no route")
        try:
            async with asyncio.timeout(timeout_s):
                while instance in self.silent:
                    await asyncio.sleep(0.01)
                async for packed in self._controls[instance].serve(pack(call)):
                    self.bytes += len(packed["m"])
                    reply = unpack(packed, WorkerReply)
                    if reply.error is not None:
                        raise from_code(*reply.error)
                    return reply
        except TimeoutError as error:
            raise DeadlineExceeded(f"worker {short(instance)} did not answer within {timeout_s:g} s") from error
        raise WorkerLost("no answer")

    def attach(
        self, owner: Owner, request_id: RequestId, index: int, token_ids: tuple[int, ...] = ()
    ) -> AsyncGenerator[Attached, None]:
        raise NotImplementedError

    def go_on(self, tokens: int = 1) -> None:
        """Every request gets tokens."""
        for engine in self.engines.values():
            engine.table = [
                msgspec.structs.replace(row, output_tokens=row.output_tokens + tokens) for row in engine.table
            ]
