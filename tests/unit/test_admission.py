# SPDX-License-Identifier: Apache-2.0
"""Seats and blocks are granted once and counted, also for landings and frozen requests: one test for both engines.

Each engine runs step by step: vLLM's real scheduler without workers, and the paged engine in virtual time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol
from unittest import mock

import pytest

from components.engine.kv import Frozen, KVOffer, RequestId
from components.engine.paged import PagedEngine, PagedOptions
from components.engine.protocol import GenerateRequest, RequestPhase, Sampling
from components.engine.vllm.control import Marker, Op
from components.errors import NoRoom
from tests.faults.agent import VirtualAgent, Wire
from tests.faults.clock import VirtualLoop
from tests.vllm_scheduler import BLOCK, PEER, Played

pytest.importorskip("vllm")
PROMPT = 3 * BLOCK
"""Tokens of a landing's prompt; all blocks but the last are offered."""


class Engine(Protocol):
    """What the test does with an engine. Requests have names."""

    @property
    def free(self) -> int: ...

    def start(self, name: str, tokens: int) -> None: ...

    def land(self, name: str, kv_tokens: int, room_tokens: int) -> bool:
        """Has it been granted a seat and blocks?"""
        ...

    def commit(self, name: str, made: int) -> None: ...

    def freeze(self, name: str) -> None: ...

    def resume(self, name: str) -> None: ...

    def end(self, name: str) -> None: ...

    def runs(self) -> set[str]:
        """Requests of the next step, once copies are there."""
        ...


def offer_of(agent: Any, name: str, kv_tokens: int, room_tokens: int) -> KVOffer:
    blocks = tuple(range(1, 1 + -(-kv_tokens // BLOCK)))
    return KVOffer(RequestId(name), (agent,), BLOCK, blocks, kv_tokens, 0, room_tokens=room_tokens)


class Vllm:
    """vLLM's scheduler with ours on top."""

    def __init__(self, model: str, seats: int, blocks: int) -> None:
        # One block is vLLM's null block.
        self._played = Played(model, blocks=blocks + 1, max_num_seqs=seats, enable_prefix_caching=False)
        self._requests: dict[str, Any] = {}

    @property
    def free(self) -> int:
        return self._played.free

    def start(self, name: str, tokens: int) -> None:
        self._requests[name] = self._played.add(list(range(1, tokens + 1)), name=name)

    def land(self, name: str, kv_tokens: int, room_tokens: int) -> bool:
        marker = Marker(RequestId(name), PROMPT, landing=offer_of(PEER, name, kv_tokens, room_tokens))
        request = self._requests[name] = self._played.add([*range(1, PROMPT + 1), 7], marker, name)
        try:
            self._played.call(Op.LANDING, request)
        except NoRoom:
            self.end(name)
            return False
        return True

    def commit(self, name: str, made: int) -> None:
        frozen = Frozen(offer_of(PEER, name, PROMPT + made - 1, 0), (7,) * made)
        self._played.call(Op.COMMIT, self._requests[name], frozen=frozen)

    def freeze(self, name: str) -> None:
        self._played.call(Op.FREEZE, self._requests[name])

    def resume(self, name: str) -> None:
        self._played.call(Op.RESUME, self._requests[name])

    def end(self, name: str) -> None:
        from vllm.v1.request import RequestStatus

        self._played.scheduler.finish_requests(self._requests.pop(name).request_id, RequestStatus.FINISHED_ABORTED)

    def runs(self) -> set[str]:
        jobs = self._played.jobs(self._played.step())
        jobs = self._played.jobs(self._played.step(self._played.done(*jobs)))
        scheduled = self._played.step(self._played.done(*jobs)).num_scheduled_tokens
        self._played.check()
        return {name for name, request in self._requests.items() if request.request_id in scheduled}


class Paged:
    """The paged engine, beside another one that has the blocks."""

    def __init__(self, loop: VirtualLoop, seats: int, blocks: int) -> None:
        self._loop = loop
        self._refused = set[str]()
        wire = Wire()
        wire.chance = mock.Mock(random=lambda: 1.0, randrange=lambda _: 0)
        sizes: dict[str, Any] = {"block_size": BLOCK, "max_model_len": 8 * BLOCK, "vocab_size": 1000, "step_s": 0.01}
        self._peer, self._engine = (
            PagedEngine(
                PagedOptions({"name": name}, num_blocks=count, max_num_seqs=seats, **sizes),
                lambda config: VirtualAgent(wire, config),  # type: ignore[arg-type,return-value]
            )
            for name, count in (("peer", 64), ("here", blocks))
        )
        self._do(self._peer.start())
        self._do(self._engine.start())

    def _do(self, work: Any) -> Any:
        return self._loop.run_until_complete(work)

    @property
    def free(self) -> int:
        stats = self._do(self._engine.report())[0]
        return int(stats.free_blocks)

    def start(self, name: str, tokens: int, made: int = 0, landing: KVOffer | None = None) -> None:
        sampling = Sampling(max_tokens=8 * BLOCK, ignore_eos=True)
        prompt = tuple(range(1, tokens + 1))
        request = GenerateRequest(RequestId(name), prompt, sampling, (7,) * made, landing=landing)
        self._loop.create_task(self._read(request))
        self._do(asyncio.sleep(0))

    async def _read(self, request: GenerateRequest) -> None:
        try:
            async for _ in self._engine.generate(request):
                continue
        except NoRoom:
            self._refused.add(str(request.request_id))

    def land(self, name: str, kv_tokens: int, room_tokens: int) -> bool:
        agent = self._peer.parts.agent.ref
        self.start(name, PROMPT, 1, offer_of(agent, name, kv_tokens, room_tokens))
        return name not in self._refused

    def commit(self, name: str, made: int) -> None:
        offer = offer_of(self._peer.parts.agent.ref, name, PROMPT + made - 1, 0)
        self._do(self._engine.commit(RequestId(name), Frozen(offer, (7,) * made)))

    def freeze(self, name: str) -> None:
        self._do(self._engine.freeze(RequestId(name)))

    def resume(self, name: str) -> None:
        self._do(self._engine.resume(RequestId(name)))

    def end(self, name: str) -> None:
        self._do(self._engine.abort(RequestId(name)))

    def runs(self) -> set[str]:
        self._do(asyncio.sleep(0.05))
        self._do(self._engine.check_integrity())
        running = (RequestPhase.PREFILL, RequestPhase.DECODE)
        return {str(info.request_id) for info in self._do(self._engine.report())[1] if info.phase in running}


@dataclass
class Engines:
    """Makes the engine that a test is about."""

    make: Callable[..., Engine]

    def __call__(self, seats: int = 4, blocks: int = 60) -> Engine:
        return self.make(seats=seats, blocks=blocks)


@pytest.fixture(params=["vllm", "paged"])
def engine(request: pytest.FixtureRequest, tiny_llama: str) -> Iterator[Engines]:
    if request.param == "vllm":
        yield Engines(lambda **sizes: Vllm(tiny_llama, **sizes))
        return
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    with mock.patch.object(time, "monotonic", loop.time):
        yield Engines(lambda **sizes: Paged(loop, **sizes))
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
    asyncio.set_event_loop(None)
    loop.close()


def test_a_landing_takes_a_seat_that_nobody_else_gets(engine: Engines) -> None:
    played = engine(seats=3)
    played.start("running", 5)
    assert played.runs() == {"running"}
    assert played.land("first", 2 * BLOCK, 4 * BLOCK) and played.land("second", 2 * BLOCK, 4 * BLOCK)
    assert not played.land("third", 2 * BLOCK, 4 * BLOCK)
    played.start("waiting", 5)
    assert played.runs() == {"running"}
    played.commit("first", 5)
    played.commit("second", 5)
    assert played.runs() == {"running", "first", "second"}
    played.end("second")
    assert played.runs() == {"running", "first", "waiting"}


def test_an_ended_landing_gives_seat_and_blocks_back(engine: Engines) -> None:
    played = engine(seats=1, blocks=12)
    assert played.land("first", 2 * BLOCK, 4 * BLOCK)
    assert played.free == 12 - 4
    played.runs()
    played.end("first")
    played.runs()
    assert played.free == 12
    assert played.land("second", 2 * BLOCK, 4 * BLOCK)


@pytest.mark.parametrize("kv_tokens", [0, 2 * BLOCK])
def test_a_commit_finds_the_blocks_that_were_granted_however_full_the_engine_is(
    engine: Engines, kv_tokens: int
) -> None:
    played = engine(seats=3, blocks=12)
    assert played.land("landed", kv_tokens, 6 * BLOCK)
    assert played.free == 12 - 6
    played.start("other", 4 * BLOCK)
    assert played.runs() == {"other"}
    # It needs the blocks that are granted to the landing, and waits.
    played.start("large", 4 * BLOCK)
    assert played.runs() == {"other"}
    played.commit("landed", 2 * BLOCK)
    assert played.runs() == {"other", "landed"}


def test_what_is_not_free_is_not_granted(engine: Engines) -> None:
    played = engine(seats=3, blocks=12)
    played.start("other", 7 * BLOCK)
    played.runs()
    assert not played.land("landed", 2 * BLOCK, 6 * BLOCK)
    free = played.free
    assert not played.land("again", 2 * BLOCK, 6 * BLOCK) and played.free == free


def test_a_frozen_request_keeps_seat_and_blocks_and_goes_on_at_once(engine: Engines) -> None:
    played = engine(seats=2)
    played.start("frozen", 5)
    played.start("running", 5)
    played.runs()
    played.freeze("frozen")
    played.start("waiting", 5)
    assert played.runs() == {"running"}
    assert not played.land("landed", 2 * BLOCK, 4 * BLOCK)
    played.resume("frozen")
    assert played.runs() == {"frozen", "running"}
    played.freeze("running")
    played.end("running")
    assert played.runs() == {"frozen", "waiting"}
