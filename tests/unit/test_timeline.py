# SPDX-License-Identifier: Apache-2.0
"""Marks of a move, and what is read from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.migration.timeline import moves_of, plot, read, steps_of
from components import timeline


def test_nothing_is_written_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timeline, "_folder", "")
    timeline.mark("source", "begun", "r")
    assert not list(tmp_path.iterdir())


def test_marks_of_all_processes_are_read_in_the_order_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "_folder", str(tmp_path / "marks"))
    timeline.mark("source", "freeze asked", "r")
    timeline.mark("target-core", "commit", "r~5f")
    (tmp_path / "marks" / "1.marks").write_text("0.5 source begun r\n")
    found = read(tmp_path / "marks")
    assert [(mark.who, mark.what, mark.request) for mark in found] == [
        ("source", "begun", "r"),
        ("source", "freeze asked", "r"),
        ("target-core", "commit", "r"),
    ]


def test_steps_are_counted_from_the_end_of_the_sources_last_step(tmp_path: Path) -> None:
    (tmp_path / "1.marks").write_text(
        "1.000 source begun r\n1.010 source token r\n1.020 source-core last step ended r\n"
        "1.021 source token r\n1.030 source first token r\n1.031 source token r\n"
        "2.000 source begun s\n"  # It did not come so far.
        "3.000 source begun r\n3.020 source-core last step ended r\n3.032 source first token r\n"
    )
    moves = moves_of(read(tmp_path))
    steps = steps_of(moves)
    assert len(moves) == 2
    assert steps["source", "first token"] == pytest.approx([10, 12])
    assert steps["source", "last token before"] == pytest.approx([1])
    plot(steps, tmp_path / "moves.svg")
    assert (tmp_path / "moves.svg").stat().st_size > 1000
