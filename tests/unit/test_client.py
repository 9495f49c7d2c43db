# SPDX-License-Identifier: Apache-2.0
"""The workers' client: differences instead of tables, missing workers, names, moves and drains."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from components.client import Drained, Workers
from components.errors import DeadlineExceeded, RequestNotFound, WorkerNotFound
from components.migration.messages import Counts, Decision, Mode, MoveRecord, Verdict, WorkerOp
from components.worker import report
from tests import fake_workers
from tests.fake_workers import info_of


class Clock:
    """Time of client and workers."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cluster(clock: Clock) -> fake_workers.Workers:
    found = fake_workers.Workers(2)
    for state in found.states.values():
        state.table.clock = clock
    return found


@pytest.fixture
def client(cluster: fake_workers.Workers, clock: Clock) -> Workers:
    return Workers(cluster, clock=clock)


def rows(client: Workers) -> dict[str, tuple[str, int]]:
    return {row.request_id: (worker.worker, row.output_tokens) for worker, row in client.status().requests()}


async def test_differences_add_up_to_the_table(cluster: fake_workers.Workers, client: Workers, clock: Clock) -> None:
    cluster.engines[1].table = [info_of("a", 5), info_of("b", 7)]
    cluster.engines[2].table = [info_of("c", 1)]
    await client.refresh()
    assert rows(client) == {"a": ("00000001", 5), "b": ("00000001", 7), "c": ("00000002", 1)}
    clock.now += 1
    cluster.go_on(3)
    cluster.engines[1].table.pop(0)
    cluster.engines[2].table.append(info_of("d", 0))
    await client.refresh()
    assert rows(client) == {"b": ("00000001", 10), "c": ("00000002", 4), "d": ("00000002", 0)}
    [first, second] = client.status().workers
    assert first.info == second.info and first.info is not None and first.info.agents[0].epoch == "01234567"
    ages = {row.request_id: row.age_s for _, row in client.status().requests()}
    assert ages == {"b": 2.0, "c": 2.0, "d": 1.0}


@pytest.mark.parametrize(("span", "width"), [(0, 1), (255, 1), (256, 2), (1 << 16, 4), (1 << 32, 8)])
def test_counts_are_packed_as_narrow_as_they_are_close_together(span: int, width: int) -> None:
    rows = [(1 << 40, 7, 3), ((1 << 40) + span, 7 + span, 3)]
    counts = msgspec.msgpack.decode(msgspec.msgpack.encode(Counts.of(rows)), type=Counts)
    assert list(counts) == rows
    assert (counts.numbers.width, counts.kv_blocks.width) == (width, 1)
    assert list(Counts.of([])) == []
    with pytest.raises(msgspec.ValidationError, match="different lengths"):
        msgspec.msgpack.decode(msgspec.msgpack.encode([counts.numbers, counts.output_tokens]), type=Counts)


async def test_what_has_not_changed_is_not_sent_again(
    cluster: fake_workers.Workers, client: Workers, clock: Clock
) -> None:
    cluster.engines[1].table = [info_of(f"a-request-with-a-long-name-{i}") for i in range(200)]
    await client.refresh()
    first, cluster.bytes = cluster.bytes, 0
    clock.now += 1
    cluster.go_on()
    await client.refresh()
    going_on, cluster.bytes = cluster.bytes, 0
    await client.refresh()
    assert going_on < first / 10
    assert cluster.bytes < first / 40
    assert len(rows(client)) == 200


async def test_an_engine_is_asked_once_for_all_who_ask(cluster: fake_workers.Workers, clock: Clock) -> None:
    clients = [Workers(cluster, clock=clock) for _ in range(5)]
    await asyncio.gather(*(client.refresh() for client in clients))
    for client in clients:
        await client.refresh()
    assert cluster.engines[1].reports == 1
    clock.now += 1
    await asyncio.gather(*(client.refresh() for client in clients))
    assert cluster.engines[1].reports == 2


async def test_tables_come_in_pages(
    cluster: fake_workers.Workers, client: Workers, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "PAGE", 10)
    cluster.engines[1].table = [info_of(f"r{i}", i) for i in range(35)]
    await client.refresh()
    assert len(rows(client)) == 35
    assert sum(1 for instance, _ in cluster.calls if instance == 1) == 4
    clock.now += 1
    cluster.go_on()
    cluster.engines[1].table = cluster.engines[1].table[20:]
    await client.refresh()
    assert rows(client) == {f"r{i}": ("00000001", i + 1) for i in range(20, 35)}


async def test_a_version_that_is_too_old_gets_everything(
    cluster: fake_workers.Workers, client: Workers, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_GONE", 4)
    cluster.engines[1].table = [info_of(f"old{i}") for i in range(10)]
    await client.refresh()
    cluster.engines[1].table = [info_of("new")]
    for _ in range(2):
        clock.now += 1
        await cluster.states[1].table.refresh()
    await client.refresh()
    assert set(rows(client)) == {"new"}


async def test_a_missing_worker_is_not_an_empty_one(
    cluster: fake_workers.Workers, client: Workers, clock: Clock
) -> None:
    cluster.engines[1].table = [info_of("a")]
    cluster.lost.add(2)
    await client.refresh()
    known, unknown = client.status().workers
    assert not known.missing and known.stats is not None
    assert unknown.stats is None and "worker_lost: worker 00000002: no route" in unknown.missing
    cluster.lost = {1}
    clock.now += 30
    await client.refresh()
    old, back = client.status().workers
    assert old.missing and old.age_s == 30 and [row.request_id for row in old.here()] == ["a"]
    assert not back.missing
    cluster.remove(1)
    await client.refresh()
    assert [worker.worker for worker in client.status().workers] == ["00000002"]


async def test_one_that_hangs_is_waited_for_once_and_joins_again(
    cluster: fake_workers.Workers, client: Workers, clock: Clock
) -> None:
    cluster.engines[1].table = [info_of("a", 1)]
    cluster.silent.add(2)
    await client.refresh(0.05)
    assert "no answer within 0.05 s" in client.status().workers[1].missing
    calls = len(cluster.calls)
    clock.now += 1
    cluster.go_on()
    # Far longer than this test may take: nobody waits for it.
    await asyncio.wait_for(client.refresh(600), 60)
    assert rows(client)["a"] == ("00000001", 2)
    assert [instance for instance, _ in cluster.calls[calls:]] == [1]
    cluster.silent.clear()
    while client._asking:
        await asyncio.sleep(0.01)
    await client.refresh(60)
    assert not client.status().workers[1].missing


async def test_a_stuck_engine_ages_and_does_not_hold_the_answer(
    cluster: fake_workers.Workers, client: Workers, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_PATIENCE_S", 0.01)
    cluster.engines[1].table = [info_of("a")]
    await client.refresh()
    cluster.engines[1].stuck = True
    clock.now += 40
    await client.refresh()
    first, second = client.status().workers
    assert (first.missing, first.age_s, len(first.requests)) == ("", 40, 1)
    assert second.age_s == 0


@pytest.mark.parametrize("off", [-3600.0, 3600.0])
async def test_ages_are_right_whatever_a_workers_clock_says(
    cluster: fake_workers.Workers, client: Workers, clock: Clock, monkeypatch: pytest.MonkeyPatch, off: float
) -> None:
    monkeypatch.setattr(report, "_PATIENCE_S", 0.01)
    theirs = Clock()
    theirs.now = clock.now + off
    cluster.states[2].table.clock = theirs
    for engine in cluster.engines.values():
        engine.table = [info_of(f"r-{id(engine)}")]
    await client.refresh()
    for engine in cluster.engines.values():
        engine.stuck = True
    for either in (clock, theirs):
        either.now += 7
    await client.refresh()
    status = client.status()
    assert [(worker.missing, worker.age_s) for worker in status.workers] == [("", 7), ("", 7)]
    assert [row.age_s for _, row in status.requests()] == [8, 8]


async def test_a_request_is_found_by_the_start_of_its_id(cluster: fake_workers.Workers, client: Workers) -> None:
    cluster.engines[1].table = [info_of("6232-a"), info_of("6233-b")]
    cluster.engines[2].table = [info_of("71-c")]
    await client.refresh()
    assert client.request("6232")[1].request_id == "6232-a"
    assert client.request("71")[0].worker == "00000002"
    with pytest.raises(RequestNotFound, match="2 running requests begin with '62'.*6232-a, 6233-b"):
        client.request("62")
    with pytest.raises(RequestNotFound, match="no running requests begin with 'x'"):
        client.request("x")


async def test_a_worker_is_found_by_the_start_of_its_name(cluster: fake_workers.Workers, client: Workers) -> None:
    cluster.add(0xAB << 24)
    await client.refresh()
    assert client.worker("AB").worker == "ab000000"
    assert client.worker("00000001").worker == "00000001"
    with pytest.raises(WorkerNotFound, match="2 workers begin with '0000000'; workers: 00000001, 00000002"):
        client.worker("0000000")
    with pytest.raises(WorkerNotFound, match="no workers begin with '7'; workers: 00000001, 00000002, ab000000"):
        client.worker("7")


async def test_a_move_is_asked_of_the_worker_that_has_the_request(
    cluster: fake_workers.Workers, client: Workers
) -> None:
    cluster.engines[1].table = [info_of("a")]
    await client.refresh()
    record = await client.move("a", "00000002", Mode.STOP_AND_COPY)
    assert record.ok and (record.source, record.target) == ("00000001", "00000002")
    instance, call = cluster.calls[-1]
    assert (instance, call.op, call.target, call.mode) == (1, WorkerOp.MIGRATE, 2, Mode.STOP_AND_COPY)


async def test_a_request_that_has_just_been_moved_is_looked_for_again(
    cluster: fake_workers.Workers, client: Workers, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def pass_by(seconds: float) -> None:
        clock.now += seconds

    cluster.engines[1].table = [info_of("a")]
    await client.refresh()
    cluster.engines[2].table.append(cluster.engines[1].table.pop())
    monkeypatch.setattr("components.client.asyncio.sleep", pass_by)
    record = await client.move("a", "00000001")
    assert record.ok and record.source == "00000002"


async def test_a_refused_move_keeps_its_code(cluster: fake_workers.Workers, client: Workers) -> None:
    cluster.engines[1].table = [info_of("a")]
    cluster.states[1].answer = MoveRecord("a", "1", "2", Mode.LIVE, ok=False, code="no_room", reason="3 blocks short")
    await client.refresh()
    record = await client.move("a")
    assert (record.ok, record.code, record.reason) == (False, "no_room", "3 blocks short")


async def test_moves_are_told_once_with_their_age(cluster: fake_workers.Workers, client: Workers, clock: Clock) -> None:
    cluster.engines[1].table = [info_of("a"), info_of("b")]
    await client.refresh()
    await client.move("a")
    for _ in range(3):
        clock.now += 1
        await client.refresh()
    assert [move.request_id for move in client.status().moves] == ["a"]
    await client.move("b")
    await client.refresh()
    assert [move.request_id for move in client.status().moves] == ["a", "b"]
    assert client.status().moves[0].age_s >= 2


async def test_a_drain_cordons_and_undrain_takes_that_back(cluster: fake_workers.Workers, client: Workers) -> None:
    await client.refresh()
    assert await client.drain("00000001", 5) == Drained("00000001", 0, ())
    await client.refresh()
    first, second = client.status().workers
    assert first.cordoned and first.draining and not second.cordoned
    assert not cluster.endpoints[1].registered
    await client.undrain("00000001")
    await client.refresh()
    assert not client.worker("00000001").cordoned and cluster.endpoints[1].registered


async def test_a_worker_without_an_answer_fails_the_call(cluster: fake_workers.Workers, client: Workers) -> None:
    await client.refresh()
    cluster.silent.add(1)
    with pytest.raises(DeadlineExceeded):
        await cluster.call(1, fake_workers.WorkerCall(WorkerOp.STATUS), 0.01)


async def test_what_planners_decided_is_part_of_the_status(cluster: fake_workers.Workers, clock: Clock) -> None:
    async def decisions() -> list[Decision]:
        return [Decision("balance", Verdict.MOVE, "usage 0.9 against 0.1", "a", "1", "2", age_s=3.0)]

    client = Workers(cluster, decisions, clock)
    await client.refresh()
    assert client.status().decisions == ()
    await client.refresh(decisions=True)
    assert client.status().decisions[0].policy == "balance"
    assert b"usage 0.9" in msgspec.json.encode(client.status())
