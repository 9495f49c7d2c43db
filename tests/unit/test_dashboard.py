# SPDX-License-Identifier: Apache-2.0
"""Web page and ``dynamo top`` from successive states: rates, missing workers, lives of requests."""

from __future__ import annotations

import io

import aiohttp
import msgspec
from rich.console import Console

from components.client import Workers
from components.dashboard.lives import Lives
from components.dashboard.sample import Sampler
from components.dashboard.server import Page, serve
from components.dashboard.top import view
from components.engine.kv import RequestId
from components.engine.protocol import RequestPhase
from components.migration.messages import Mode, MoveRecord, RequestRow
from components.status import Status, WorkerReport
from tests import fake_workers
from tests.fake_workers import info_of


def at(worker: str, phase: RequestPhase = RequestPhase.DECODE, age_s: float = 1.0, **more: object) -> WorkerReport:
    row = RequestRow(1, RequestId("r"), phase, 10, output_tokens=5, age_s=age_s)
    return WorkerReport(worker, "decode", requests=(row,), **more)  # type: ignore[arg-type]


def test_a_life_is_pieced_together_from_where_a_request_was_seen() -> None:
    lives = Lives()
    lives.take(Status((at("a"),)), 101.0)
    moved = MoveRecord("r", "a", "b", Mode.LIVE, ok=True, tokens=7, downtime_s=0.25, total_s=0.5, age_s=0.5)
    for _ in range(2):
        lives.take(Status((at("b", age_s=2.0),), moves=(moved,)), 102.0)
    [life] = lives.take(
        Status((WorkerReport("b", "decode"),), moves=(msgspec.structs.replace(moved, age_s=1.5),)), 103.0
    )
    assert life.over
    assert [(part.kind, part.worker, part.began, part.ended) for part in life.parts] == [
        ("decode", "a", 100.0, 101.5),
        ("decode", "b", 101.5, 102.0),
        ("copying", "b", 101.0, 101.5),
        ("frozen", "a", 101.25, 101.5),
    ]
    assert lives.take(Status(), 200.0) == ()


def test_a_relay_and_a_landing_are_no_second_life() -> None:
    lives = Lives()
    relayed = RequestRow(1, RequestId("r"), RequestPhase.DECODE, 10, relayed_from="b")
    lives.take(Status((WorkerReport("a", "decode", requests=(relayed,)), at("b"))), 10.0)
    [life] = lives.take(Status((at("b"), at("c", RequestPhase.LANDING))), 11.0)
    assert {part.worker for part in life.parts} == {"b"}


async def test_who_is_missing_is_said_and_shown_and_not_counted_as_empty() -> None:
    cluster = fake_workers.Workers(3)
    cluster.engines[1].table = [info_of("a"), info_of("b")]
    cluster.lost = {2}
    sampler = Sampler(Workers(cluster))
    await sampler.once()
    assert sampler.latest is not None
    assert sampler.error == "worker 00000002 is missing: worker_lost: worker 00000002: no route"
    assert [load.worker for load in sampler.latest.point.workers] == ["00000001", "00000003"]
    assert sampler.latest.point.requests == 2
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(view(sampler.latest, sampler.history, sampler.error))
    text = console.export_text()
    assert any("00000002" in line and "missing" in line for line in text.splitlines())
    # A page is sent it every second: tables of requests stay out.
    assert all(not worker["requests"] for worker in msgspec.json.decode(msgspec.json.encode(sampler.latest))["workers"])


async def test_rates_are_those_between_two_looks() -> None:
    cluster = fake_workers.Workers(1)
    sampler = Sampler(Workers(cluster))
    await sampler.once()
    cluster.states[1].requests.arrivals.tokens_total = 500
    await sampler.once()
    assert sampler.latest is not None and sampler.latest.point.tokens_per_s > 0


async def test_who_opens_the_page_or_comes_back_gets_everything_at_once() -> None:
    sampler = Sampler(Workers(fake_workers.Workers(2)))
    for _ in range(3):
        await sampler.once()
    runner = await serve(Page(sampler), "127.0.0.1", 0)
    address = f"http://127.0.0.1:{runner.addresses[0][1]}/api/stream"
    async with aiohttp.ClientSession() as client, client.get(address) as reply:
        first = msgspec.json.decode((await reply.content.readline()).removeprefix(b"data: "))
        assert len(first["history"]) == 3 and len(first["latest"]["workers"]) == 2
        await reply.content.readline()
        await sampler.once()
        second = msgspec.json.decode((await reply.content.readline()).removeprefix(b"data: "))
        assert "history" not in second and second["latest"]["point"] != first["latest"]["point"]
    await runner.cleanup()
