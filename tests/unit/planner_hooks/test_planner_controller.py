# SPDX-License-Identifier: Apache-2.0
"""The controller on scripted workers: its commands, forbidden commands, and its reaction to failures."""

from __future__ import annotations

import asyncio
import random
import threading

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from components.client import Drained
from components.engine.protocol import RequestPhase
from components.errors import MigrateError, NoRoom, RequestNotFound, WorkerLost, WorkerNotFound
from components.migration.messages import Mode, MoveRecord
from planner_hooks.config import parse
from planner_hooks.controller import MOVES, Controller
from planner_hooks.observe import Look, Observer
from planner_hooks.snapshot import Snapshot
from planner_hooks.table import Table, Tables
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
        self.client = Tables(self.workers)
        self.calls: list[tuple[str, str, str]] = []
        self.answer: MigrateError | tuple[str, str] | None = None

    def places(self) -> list[int]:
        return [instance for instance, engine in self.workers.engines.items() for _ in engine.table]

    async def refresh(self, patience_s: float) -> None:
        for state in self.workers.states.values():
            state.table._told_at = -10.0
        await self.client.refresh(patience_s)

    def tables(self) -> list[Table]:
        return self.client.tables()

    def moves(self) -> tuple[MoveRecord, ...]:
        return self.client.moves()

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
    assert tested.outcomes == {"done": before}


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
    assert failed and tested.outcomes == {"failed": failed}
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
    for _, rows, _ in cluster.tables()[0]._pages:
        for row in rows:
            row.life = 7
    cluster.migrate = migrate  # type: ignore[method-assign]
    tested = controller(cluster)
    await tested.tick()
    await tested.idle()
    assert lives and set(lives) == {7}


async def test_the_loop_goes_on_while_a_decision_is_made() -> None:
    decided_meanwhile = threading.Event()

    class Slow(Observer):
        def snapshot(self, look: Look, stale_after_s: float) -> Snapshot:
            assert decided_meanwhile.wait(30)
            return super().snapshot(look, stale_after_s)

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


async def test_only_a_worker_that_answers_can_say_that_its_requests_have_ended() -> None:
    """One that misses a report keeps its requests, and one that has gone has not finished them."""
    cluster = Cluster({f"r{i}": 1 for i in range(100)})
    observer = Observer(parse(POLICY).controller.cost)

    async def expected() -> tuple[int, float]:
        await cluster.refresh(0.1)
        seen = observer.snapshot(observer.look(cluster.tables(), ()), 5.0)
        return len(seen.request_ids), float(observer._remaining.of(np.zeros(1))[0])

    [_, before] = await expected()
    cluster.workers.lost.add(1)
    assert await expected() == (100, before)
    lost = cluster.workers.engines.pop(1)
    assert await expected() == (0, before)
    cluster.workers.lost.clear()
    cluster.workers.engines[1] = lost
    assert await expected() == (100, before)
    lost.table.clear()
    count, after = await expected()
    assert count == 0 and after != before


async def test_columns_follow_requests_that_come_go_on_change_and_go() -> None:
    cluster = Cluster({f"r{i}": 1 + i % 2 for i in range(40)})
    observer = Observer(parse(POLICY).controller.cost)
    chooser = random.Random(1)
    for step in range(30):
        for instance, engine in cluster.workers.engines.items():
            rows = [row for row in engine.table if chooser.random() > 0.1]
            rows = [
                msgspec.structs.replace(
                    row,
                    output_tokens=row.output_tokens + chooser.randint(0, 3),
                    phase=RequestPhase.WAITING if chooser.random() < 0.1 else RequestPhase.DECODE,
                )
                for row in rows
            ]
            engine.table = rows + [info_of(f"new{instance}.{step}.{i}", 0) for i in range(chooser.randint(0, 5))]
        await cluster.refresh(1.0)
        look = observer.look(cluster.tables(), ())
        seen, capture = observer.snapshot(look, 5.0), observer.capture(look)
        expected = {
            row.request_id: (f"{instance:08x}", row.prompt_tokens + row.output_tokens, row.phase)
            for instance, engine in cluster.workers.engines.items()
            for row in engine.table
        }
        assert {v.request_id: (v.worker, v.need_tokens, v.phase) for v in capture.requests} == expected
        again = Snapshot.of(capture)
        assert list(seen.request_ids) == list(again.request_ids)
        for name in ("r_worker", "r_kv", "r_need", "r_remaining", "r_running", "r_waiting", "r_free"):
            np.testing.assert_array_equal(getattr(seen, name), getattr(again, name))


async def test_a_request_that_two_workers_list_is_where_the_younger_report_has_it() -> None:
    cluster = Cluster({"twice": 1, "a": 1, "b": 2})
    cluster.workers.engines[2].table.append(info_of("twice"))
    observer = Observer(parse(POLICY).controller.cost)
    await cluster.refresh(1.0)
    for instance, older in ((1, "00000001"), (2, "00000002")):
        cluster.client._told[instance]._at -= 2.0 * instance
        move = MoveRecord("twice", "00000001", "00000002", Mode.LIVE, ok=True)
        seen = observer.snapshot(observer.look(cluster.tables(), (move,)), 50.0)
        assert sorted(seen.request_ids) == ["a", "b", "twice"]
        row = list(seen.request_ids).index("twice")
        assert seen.worker_ids[seen.r_worker[row]] != older
        assert seen.r_since_move[row] == 0.0 and seen.worker_ids[seen.r_came_from[row]] == "00000001"
    cluster.workers.engines[1].table = [info_of("a")]
    await cluster.refresh(1.0)
    seen = observer.snapshot(observer.look(cluster.tables(), ()), 50.0)
    assert sorted(seen.request_ids) == ["a", "b", "twice"]


async def test_no_priority_that_a_client_may_choose_makes_the_planner_blind() -> None:
    cluster = Cluster({"a": 1})
    cluster.workers.engines[1].table += [info_of("first", priority=-(1 << 60)), info_of("last", priority=1 << 60)]
    observer = Observer(parse(POLICY).controller.cost)
    await cluster.refresh(1.0)
    seen = observer.snapshot(observer.look(cluster.tables(), ()), 5.0)
    assert seen.r_priority.tolist() == [0, (1 << 31) - 1, -((1 << 31) - 1)]
