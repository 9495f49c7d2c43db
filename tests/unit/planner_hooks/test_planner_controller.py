# SPDX-License-Identifier: Apache-2.0
"""The controller on a scripted router: what it asks for, what it never asks for, and what it makes of failures."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable

import pytest
from typer.testing import CliRunner

from components.engine.protocol import EngineStats, RequestId, RequestInfo, RequestPhase
from components.errors import MigrateError, NoRoom, RequestNotFound, WorkerLost
from components.messages import Mode, MoveRecord, RouterReply, StreamInfo, WorkerInfo
from planner_hooks.config import parse
from planner_hooks.controller import MOVES, Controller
from planner_hooks.observe import Observer
from planner_hooks.snapshot import ActiveMove, Capture

POLICY = {
    "limits": {"cooldown-s": 0, "no-return-s": 0},
    "cost": {"min-gain": 0},
    "policies": {"balance": {"high": 0.1, "start-gap": 0.2, "stop-gap": 0.1}},
}


class ScriptedRouter:
    """Two workers at first; requests are where the test puts them until a migration moves them."""

    def __init__(self, places: dict[str, str]) -> None:
        self.places = places
        self.names = ["a", "b"]
        self.calls: list[tuple[str, str, str]] = []
        self.answer: Exception | str = ""

    async def status(self) -> RouterReply:
        workers = []
        for name in self.names:
            here = [r for r, place in self.places.items() if place == name]
            rows = tuple(
                RequestInfo(RequestId(r), RequestPhase.DECODE, 100, 50, kv_blocks=10, age_s=1.0, max_tokens=1000)
                for r in here
            )
            stats = EngineStats(len(here), 0, 0, 0, 100 - 10 * len(here), 100, step_s=0.05)
            workers.append(WorkerInfo(name, "decode", False, (), (), (), stats, rows, 16, 16, 1000))
        streams = tuple(StreamInfo(r, place, 100, 50, 1.0) for r, place in self.places.items())
        return RouterReply(workers=tuple(workers), streams=streams)

    async def migrate(self, request_id: str, worker: str, mode: Mode, source: str) -> MoveRecord:
        self.calls.append((request_id, worker, source))
        await asyncio.sleep(0)
        if isinstance(self.answer, Exception):
            raise self.answer
        if not self.answer:
            self.places[request_id] = worker
        return MoveRecord(request_id, source, worker, mode, ok=not self.answer, reason=str(self.answer))

    async def drain(self, worker: str, timeout_s: float) -> list[MoveRecord]:
        return []

    async def undrain(self, worker: str) -> None:
        return None


def controller(router: ScriptedRouter, **more: object) -> Controller:
    policy = parse(POLICY | more)
    return Controller(policy, router, Observer(policy.controller.cost))


async def test_it_moves_from_the_full_worker_and_comes_to_rest() -> None:
    router = ScriptedRouter({f"r{i}": "a" for i in range(6)})
    tested = controller(router)
    for _ in range(5):
        await tested.tick()
        await tested.idle()
    assert {(worker, source) for _, worker, source in router.calls} == {("b", "a")}
    assert sorted(router.places.values()).count("b") in (2, 3)
    before = len(router.calls)
    await tested.tick()
    assert len(router.calls) == before
    assert all(o.ok and o.gap_after is not None and o.gap_after < o.gap_before for o in tested.outcomes)


async def test_a_new_worker_takes_running_requests_in_the_first_decision_that_sees_it() -> None:
    router = ScriptedRouter({f"r{i}": "ab"[i % 2] for i in range(12)})
    tested = controller(router)
    assert not (await tested.tick()).moves
    router.names.append("c")
    await tested.tick()
    await tested.idle()
    assert router.calls and {worker for _, worker, _ in router.calls} == {"c"}


async def test_dry_run_asks_for_nothing() -> None:
    router = ScriptedRouter({f"r{i}": "a" for i in range(6)})
    tested = controller(router, **{"dry-run": True})
    assert (await tested.tick()).moves
    await tested.idle()
    assert router.calls == []


@pytest.mark.parametrize("answer", ["the request has left worker a", WorkerLost("no router answers")])
async def test_a_failed_move_rests_its_pair(answer: Exception | str) -> None:
    router = ScriptedRouter({f"r{i}": "a" for i in range(6)})
    router.answer = answer
    tested = controller(router)
    await tested.tick()
    await tested.idle()
    failed = len(router.calls)
    assert failed and not any(outcome.ok for outcome in tested.outcomes)
    await tested.tick()
    await tested.idle()
    assert len(router.calls) == failed


@pytest.mark.parametrize(
    ("answer", "counted"),
    [
        (RequestNotFound("no request r0 is running"), "world-changed"),
        (NoRoom("0 workers match 'b'"), "world-changed"),
        (WorkerLost("no router answers"), "failed"),
    ],
)
async def test_what_vanished_before_the_move_began_is_counted_apart(answer: MigrateError, counted: str) -> None:
    router = ScriptedRouter({f"r{i}": "a" for i in range(6)})
    router.answer = answer
    before = MOVES.labels("balance", counted)._value.get()
    tested = controller(router)
    await tested.tick()
    await tested.idle()
    assert MOVES.labels("balance", counted)._value.get() - before == len(router.calls) > 0


async def test_a_request_under_way_is_not_asked_for_again() -> None:
    router = ScriptedRouter({f"r{i}": "a" for i in range(6)})
    tested = controller(router)
    await tested.tick()
    await tested.tick()
    await tested.idle()
    asked = [request for request, _, _ in router.calls]
    assert len(asked) == len(set(asked))


async def test_the_loop_goes_on_while_a_decision_is_made() -> None:
    decided_meanwhile = threading.Event()

    class Slow(Observer):
        def capture(self, status: RouterReply, active: Iterable[ActiveMove] = ()) -> Capture:
            assert decided_meanwhile.wait(30)
            return super().capture(status, active)

    policy = parse(POLICY)
    tested = Controller(policy, ScriptedRouter({f"r{i}": "a" for i in range(6)}), Slow(policy.controller.cost))
    deciding = asyncio.ensure_future(tested.tick())
    await asyncio.sleep(0.1)
    decided_meanwhile.set()
    assert (await deciding).moves


def test_explain_refuses_what_is_no_snapshot() -> None:
    from components.cli.policy import app

    result = CliRunner().invoke(app, ["explain", "--snapshot", "no-such-file.json"])
    assert result.exit_code != 0
    assert "no-such-file.json" in str(result.exception)
