# SPDX-License-Identifier: Apache-2.0
"""The controller on scripted workers: its commands, forbidden commands, and its reaction to failures."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from components.client import Drained, Workers
from components.engine.kv import RequestId
from components.engine.protocol import EngineStats, RequestPhase
from components.errors import MigrateError, NoRoom, RequestNotFound, WorkerLost, WorkerNotFound
from components.migration.messages import Mode, MoveRecord, RequestRow
from components.status import Status, WorkerReport
from planner_hooks.config import parse
from planner_hooks.controller import MOVES, Controller
from planner_hooks.observe import Observer
from planner_hooks.snapshot import ActiveMove, Snapshot
from tests import fake_workers
from tests.fake_workers import info_of

POLICY = {
    "limits": {"cooldown-s": 0, "no-return-s": 0},
    "cost": {"min-gain": 0},
    "policies": {"balance": {"high": 0.1, "start-gap": 0.2, "stop-gap": 0.1}},
}


class Cluster:
    """Two workers at first; requests are where the test puts them until a migration moves them."""

    def __init__(self, places: dict[str, int]) -> None:
        self.workers = fake_workers.Workers(2)
        for request, place in places.items():
            self.workers.engines[place].table.append(info_of(request))
        self.client = Workers(self.workers)
        self.calls: list[tuple[str, str, str]] = []
        self.answer: MigrateError | tuple[str, str] | None = None

    def places(self) -> list[int]:
        return [instance for instance, engine in self.workers.engines.items() for _ in engine.table]

    async def refresh(self, patience_s: float) -> None:
        for state in self.workers.states.values():
            state._report._told_at = -10.0
        await self.client.refresh(patience_s)

    def status(self, ages: bool = True) -> Status:
        return self.client.status(ages)

    async def migrate(self, request_id: str, source: str, target: str, mode: Mode, life: int) -> MoveRecord:
        self.calls.append((request_id, target, source))
        await asyncio.sleep(0)
        if isinstance(self.answer, MigrateError):
            raise self.answer
        if self.answer is not None:
            return MoveRecord(request_id, source, target, mode, False, *self.answer)
        return await self.client.migrate(request_id, source, target, mode, life)

    async def drain(self, worker: str, timeout_s: float) -> Drained:
        return await self.client.drain(worker, timeout_s)

    async def undrain(self, worker: str) -> None:
        await self.client.undrain(worker)


def controller(cluster: Cluster, **more: object) -> Controller:
    policy = parse(POLICY | more)
    return Controller(policy, cluster, Observer(policy.controller.cost))


def full() -> Cluster:
    return Cluster({f"r{i}": 1 for i in range(6)})


async def test_it_moves_from_the_full_worker_and_comes_to_rest() -> None:
    cluster = full()
    tested = controller(cluster)
    for _ in range(5):
        await tested.tick()
        await tested.idle()
    assert {(worker, source) for _, worker, source in cluster.calls} == {("00000002", "00000001")}
    assert cluster.places().count(2) in (2, 3)
    before = len(cluster.calls)
    await tested.tick()
    assert len(cluster.calls) == before
    assert all(o.ok and o.gap_after is not None and o.gap_after < o.gap_before for o in tested.outcomes)


async def test_a_new_worker_takes_running_requests_in_the_first_decision_that_sees_it() -> None:
    cluster = Cluster({f"r{i}": 1 + i % 2 for i in range(12)})
    tested = controller(cluster)
    assert not (await tested.tick()).moves
    cluster.workers.add(3)
    await tested.tick()
    await tested.idle()
    assert cluster.calls and {worker for _, worker, _ in cluster.calls} == {"00000003"}


async def test_dry_run_asks_for_nothing() -> None:
    cluster = full()
    tested = controller(cluster, **{"dry-run": True})
    assert (await tested.tick()).moves
    await tested.idle()
    assert cluster.calls == []


@pytest.mark.parametrize("answer", [("deadline", "no token within 20 s"), WorkerLost("no route")])
async def test_a_failed_move_rests_its_pair(answer: MigrateError | tuple[str, str]) -> None:
    cluster = full()
    cluster.answer = answer
    tested = controller(cluster)
    await tested.tick()
    await tested.idle()
    failed = len(cluster.calls)
    assert failed and not any(outcome.ok for outcome in tested.outcomes)
    await tested.tick()
    await tested.idle()
    assert len(cluster.calls) == failed


@pytest.mark.parametrize(
    ("answer", "counted"),
    [
        (RequestNotFound("no request r0 is running"), "world-changed"),
        (WorkerNotFound("no workers begin with 'b'"), "world-changed"),
        ((NoRoom.code, "3 blocks are missing"), "world-changed"),
        (("refused", "worker b is cordoned"), "world-changed"),
        (WorkerLost("no route"), "failed"),
    ],
)
async def test_what_vanished_before_the_move_began_is_counted_apart(
    answer: MigrateError | tuple[str, str], counted: str
) -> None:
    cluster = full()
    cluster.answer = answer
    before = MOVES.labels("balance", counted)._value.get()
    tested = controller(cluster)
    await tested.tick()
    await tested.idle()
    assert MOVES.labels("balance", counted)._value.get() - before == len(cluster.calls) > 0


async def test_a_request_under_way_is_not_asked_for_again() -> None:
    cluster = full()
    tested = controller(cluster)
    await tested.tick()
    await tested.tick()
    await tested.idle()
    asked = [request for request, _, _ in cluster.calls]
    assert len(asked) == len(set(asked))


async def test_a_missing_worker_is_neither_source_nor_destination_and_holds_nothing_up() -> None:
    cluster = full()
    cluster.workers.add(3)
    tested = controller(cluster, limits={"stale-after-s": 2.5, "cooldown-s": 0, "no-return-s": 0})
    cluster.workers.silent.add(3)
    await tested.tick()
    await tested.idle()
    assert {worker for _, worker, _ in cluster.calls} == {"00000002"}
    assert tested.seen is not None and "00000003" not in tested.seen.worker_ids
    cluster.workers.silent = set()
    while cluster.client._asking:
        await asyncio.sleep(0.01)
    await tested.tick()
    assert "00000003" in tested.seen.worker_ids
    cluster.workers.lost.add(1)
    cluster.client._told[1]._at -= 60
    await tested.tick()
    seen = tested.seen
    assert not seen.w_fresh[seen.index["00000001"]] and len(seen.rows_of(seen.index["00000001"])) > 0


async def test_without_any_answer_nothing_is_decided() -> None:
    cluster = full()
    cluster.workers.lost = {1, 2}
    with pytest.raises(WorkerLost, match="no worker tells its state"):
        await controller(cluster).tick()


async def test_a_life_that_has_gone_and_come_back_is_not_meant() -> None:
    cluster = full()
    lives = []

    async def migrate(request_id: str, source: str, target: str, mode: Mode, life: int) -> MoveRecord:
        lives.append(life)
        return MoveRecord(request_id, source, target, mode, ok=False, code="request_not_found")

    await cluster.refresh(1.0)
    for row in cluster.client._told[1]._rows.values():
        row.life = 7
    cluster.migrate = migrate  # type: ignore[method-assign]
    tested = controller(cluster)
    await tested.tick()
    await tested.idle()
    assert lives and set(lives) == {7}


async def test_the_loop_goes_on_while_a_decision_is_made() -> None:
    decided_meanwhile = threading.Event()

    class Slow(Observer):
        def snapshot(self, status: Status, active: Iterable[ActiveMove], stale_after_s: float) -> Snapshot:
            assert decided_meanwhile.wait(30)
            return super().snapshot(status, active, stale_after_s)

    policy = parse(POLICY)
    tested = Controller(policy, full(), Slow(policy.controller.cost))
    deciding = asyncio.ensure_future(tested.tick())
    await asyncio.sleep(0.1)
    decided_meanwhile.set()
    assert (await deciding).moves


def test_explain_refuses_what_is_no_snapshot() -> None:
    from components.cli.policy import app

    result = CliRunner().invoke(app, ["explain", "--snapshot", "no-such-file.json"])
    assert result.exit_code != 0
    assert "no-such-file.json" in str(result.exception)


def test_only_a_worker_that_answers_can_say_that_its_requests_have_ended() -> None:
    """One that misses a report keeps its requests, and one that has gone has not finished them."""
    observer = Observer(parse(POLICY).controller.cost)
    rows = tuple(RequestRow(n, RequestId(f"r{n}"), RequestPhase.DECODE, 10, 50) for n in range(1, 101))
    there = WorkerReport("a", "decode", info=fake_workers.INFO, stats=EngineStats(100, 0, 0, 0, 0, 100), requests=rows)
    other = msgspec.structs.replace(there, worker="b", requests=())
    before = observer._remaining.of(np.zeros(1))[0]
    observer.capture(Status((there, other)))
    missing = msgspec.structs.replace(there, missing="no answer")
    assert len(observer.capture(Status((missing, other))).requests) == 100
    observer.capture(Status((other,)))
    assert observer._remaining.of(np.zeros(1))[0] == before
    observer.capture(Status((there, other)))
    observer.capture(Status((msgspec.structs.replace(there, requests=()), other)))
    assert observer._remaining.of(np.zeros(1))[0] != before
