# SPDX-License-Identifier: Apache-2.0
"""The engine protocol as a state machine: calls in any order, also invalid ones, on three engines.

Invariants, after every call: blocks and requests of each engine add up; every token that any engine gives is that of
the undisturbed request at its index. At the end, once all leases are over: no engine holds a block.
"""

from __future__ import annotations

import asyncio
from random import Random
from typing import Any

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from components.engine.kv import Frozen, KVOffer, RequestId
from components.engine.paged import PagedEngine, PagedOptions
from components.engine.protocol import GenerateOutput
from components.errors import MigrateError
from tests.faults.agent import VirtualAgent, Wire
from tests.faults.clock import VirtualLoop
from tests.faults.model import SIZES, expected
from tests.faults.model import request as made

ENGINES = 3
LEASE_S = 5.0
BODIES = [
    made(f"r{seed}", [(seed * 37 + i) % 5000 for i in range(9 + 8 * seed)], 30, seed or None) for seed in range(3)
]
RIGHT = [expected(body) for body in BODIES]
engine = st.integers(0, ENGINES - 1)
request = st.integers(0, len(BODIES) - 1)


class Protocol(RuleBasedStateMachine):
    """See the module docstring."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualLoop()
        asyncio.set_event_loop(self.loop)
        self.patch: Any = None
        self.offers: dict[int, list[KVOffer]] = {}
        self.frozen: dict[int, list[Frozen]] = {}
        self.wrong: list[str] = []
        self.readers: list[asyncio.Future[None]] = []

    @initialize(blocks=st.sampled_from([45, 60]), integrity=st.sampled_from(["tail", "full"]), fail=st.booleans())
    def begin(self, blocks: int, integrity: str, fail: bool) -> None:
        import time
        from unittest import mock

        self.patch = mock.patch.object(time, "monotonic", self.loop.time)
        self.patch.start()
        wire = Wire()
        wire.chance = Random(1)
        wire.fail = wire.hang = 0.2 if fail else 0.0
        options: dict[str, Any] = SIZES | {"num_blocks": blocks, "lease_s": LEASE_S, "copy_deadline_s": 2.0}
        self.engines = [
            PagedEngine(
                PagedOptions({"name": f"engine-{number}"}, integrity=integrity, **options),
                lambda config: VirtualAgent(wire, config),  # type: ignore[arg-type,return-value]
            )
            for number in range(ENGINES)
        ]
        for each in self.engines:
            self.do(each.start())

    def do(self, work: Any) -> Any:
        """The result of a call; nothing when it was refused."""
        try:
            return self.loop.run_until_complete(asyncio.wait_for(work, 60.0))
        except MigrateError:
            return None

    async def read(self, number: int, stream: Any) -> None:
        try:
            async for output in stream:
                self.check(number, output)
        except MigrateError:
            return

    def check(self, number: int, output: GenerateOutput) -> None:
        right = RIGHT[number][output.index : output.index + len(output.token_ids)]
        if list(output.token_ids) != right:
            self.wrong.append(f"request {number}: {output.token_ids} at {output.index} instead of {right}")

    def enter(self, on: int, number: int, known: int, landing: KVOffer | None) -> None:
        whole = msgspec.structs.replace(BODIES[number], output_token_ids=tuple(RIGHT[number][:known]), landing=landing)
        stream = self.engines[on].generate(whole)
        self.readers.append(asyncio.ensure_future(self.read(number, stream), loop=self.loop))
        self.pass_time(0.0)

    # Calls

    @rule(on=engine, number=request, known=st.sampled_from([0, 0, 3, 12, 29]))
    def start_or_replay(self, on: int, number: int, known: int) -> None:
        self.enter(on, number, known, None)

    @rule(seconds=st.sampled_from([0.0, 0.011, 0.05, 0.2]))
    def pass_time(self, seconds: float) -> None:
        self.loop.run_until_complete(asyncio.sleep(seconds))

    @rule(on=engine, number=request)
    def offer(self, on: int, number: int) -> None:
        if (given := self.do(self.engines[on].offer(RequestId(f"r{number}")))) is not None:
            self.offers.setdefault(number, []).append(given)

    @rule(on=engine, number=request, data=st.data(), known=st.sampled_from([0, 3, 12]))
    def land(self, on: int, number: int, data: st.DataObject, known: int) -> None:
        if number in self.offers:
            self.enter(on, number, known, data.draw(st.sampled_from(self.offers[number])))

    @rule(on=engine, number=request, data=st.data(), known=st.sampled_from([3, 12, 20]))
    def extend(self, on: int, number: int, data: st.DataObject, known: int) -> None:
        if number in self.offers:
            given = data.draw(st.sampled_from(self.offers[number]))
            # A source only extends by tokens that it has seen, up to those of the offer.
            self.do(self.engines[on].extend(RequestId(f"r{number}"), given, tuple(RIGHT[number][:known])))

    @rule(on=engine, number=request)
    def freeze(self, on: int, number: int) -> None:
        if (given := self.do(self.engines[on].freeze(RequestId(f"r{number}")))) is not None:
            self.frozen.setdefault(number, []).append(given)

    @rule(on=engine, number=request, data=st.data())
    def commit(self, on: int, number: int, data: st.DataObject) -> None:
        if number in self.frozen:
            self.do(self.engines[on].commit(RequestId(f"r{number}"), data.draw(st.sampled_from(self.frozen[number]))))

    @rule(on=engine, number=request, what=st.sampled_from(["resume", "release", "abort", "landing_status"]))
    def call(self, on: int, number: int, what: str) -> None:
        self.do(getattr(self.engines[on], what)(RequestId(f"r{number}")))

    @rule(on=engine)
    def preempt(self, on: int) -> None:
        scheduler = self.engines[on].parts.scheduler
        if running := [a for a in scheduler.requests.values() if a.phase in ("prefill", "decode")]:
            scheduler._batch.pop(running[0], None)
            scheduler.preempt(running[0])

    # Invariants

    @invariant()
    def blocks_add_up_and_no_token_is_wrong(self) -> None:
        assert not self.wrong, self.wrong
        for each in getattr(self, "engines", []):
            self.loop.run_until_complete(each.check_integrity())

    def teardown(self) -> None:
        try:
            if hasattr(self, "engines"):
                self.pass_time(4 * LEASE_S + 40.0)
                self.blocks_add_up_and_no_token_is_wrong()
                assert all(reader.done() for reader in self.readers), "a stream hangs"
                for each in self.engines:
                    stats, rows = self.loop.run_until_complete(each.report())
                    assert stats.free_blocks == stats.total_blocks, rows
                    self.loop.run_until_complete(each.stop())
        finally:
            if self.patch is not None:
                self.patch.stop()
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.loop.run_until_complete(asyncio.sleep(0))
            asyncio.set_event_loop(None)
            self.loop.close()


Protocol.TestCase.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
TestProtocol = Protocol.TestCase
