# SPDX-License-Identifier: Apache-2.0
"""A planner's decisions in ``dynamo top``: moves, retirements and reasons."""

from __future__ import annotations

import asyncio
import io

from rich.console import Console

from components.dashboard.sample import Sampler
from components.dashboard.top import view
from components.messages import unpack
from components.migration.messages import Decision, PlannerReply, Verdict
from components.status import Status
from planner_hooks.config import parse
from planner_hooks.report import MAX_DECISIONS, Board, decisions
from planner_hooks.snapshot import Capture, Snapshot
from tests.unit.planner_hooks.clusters import cluster, request


class Workers:
    """A system whose planner has decided this."""

    def __init__(self, found: tuple[Decision, ...]) -> None:
        self._found = found

    async def refresh(self, patience_s: float, decisions: bool = False) -> None:
        assert decisions

    def status(self) -> Status:
        return Status(decisions=self._found)


def screen(found: tuple[Decision, ...]) -> str:
    sampler = Sampler(Workers(found))  # type: ignore[arg-type]
    asyncio.run(sampler.once())
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(view(sampler.latest, sampler.history))
    return console.export_text()


def decided(capture: Capture) -> tuple[Decision, ...]:
    return decisions(parse({}).build().plan(Snapshot.of(capture)))


def test_top_shows_moves_with_their_reasons_and_what_is_left_alone() -> None:
    text = screen(decided(cluster([request(f"req{i}", "w0", 1000) for i in range(9)])))
    assert "planner" in text
    lines = [line for line in text.splitlines() if "move" in line and "w0 → w1" in line]
    assert lines and all("balance" in line and "usage" in line for line in lines)
    assert any("defragment" in line and "leave" in line for line in text.splitlines())


def test_top_shows_retired_workers_and_no_table_without_a_planner() -> None:
    quiet = cluster([request("a", "w0", 100), request("b", "w1", 100)], 3)
    assert "could do without it" in screen(decided(quiet))
    assert "planner" not in screen(())


def test_nobody_is_told_more_than_people_can_read() -> None:
    capture = cluster([request(f"r{i}", "w0", 30, not_migratable="guided decoding") for i in range(400)], 1)
    draining = cluster([request(f"r{i}", "w0", 30) for i in range(400)], {"w0": {"draining": True}})
    assert len(decided(capture)) <= MAX_DECISIONS
    assert len(decided(draining)) <= MAX_DECISIONS


async def test_a_planner_tells_its_last_moves_and_what_it_leaves_alone_now() -> None:
    now = 100.0
    board = Board(lambda: now)
    busy = parse({}).build().plan(Snapshot.of(cluster([request(f"req{i}", "w0", 1000) for i in range(9)])))
    board.take(busy)
    now = 103.0
    board.take(parse({}).build().plan(Snapshot.of(cluster([request("a", "w0", 100), request("b", "w1", 100)]))))
    [reply] = [unpack(item, PlannerReply) async for item in board.serve({})]
    moves = [decision for decision in reply.decisions if decision.verdict is Verdict.MOVE]
    assert len(moves) == len(busy.moves) > 0 and {move.age_s for move in moves} == {3.0}
    assert {d.age_s for d in reply.decisions if d.verdict is Verdict.LEAVE} == {0.0}
