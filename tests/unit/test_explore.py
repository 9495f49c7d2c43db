# SPDX-License-Identifier: Apache-2.0
"""A part of ``tests.faults.explore``: every single fault of a request that goes to and fro, and a few with many."""

from __future__ import annotations

import pytest

from components.migration.messages import Mode
from tests.faults import explore
from tests.virtual import Fate


@pytest.mark.parametrize("direct", [False, True], ids=["workers commit", "engines commit"])
@pytest.mark.parametrize("mode", list(Mode))
def test_no_single_fault_mixes_answers_or_leaves_anything(mode: Mode, direct: bool) -> None:
    runs = list(explore.exhaustively(mode, 1, direct))
    assert [(found.plan, found.problems) for found in runs if found.problems] == []
    # A replay needs no call between workers.
    assert runs[0].moves == explore.MOVES and (len(runs) > 50 or mode is Mode.REPLAY)


@pytest.mark.parametrize("seed", range(40))
def test_no_series_of_faults_does(seed: int) -> None:
    found = explore.randomly(seed)
    assert not found.problems, found.plan


def test_an_answer_of_two_engines_at_once_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The invariant itself: an engine that goes on from other tokens than those of its client."""
    from components.engine.paged.scheduler import Scheduler

    add = Scheduler._add_token

    def spoilt(self: Scheduler, active: object) -> None:
        add(self, active)  # type: ignore[arg-type]
        if len(active.tokens) == 40:  # type: ignore[attr-defined]
            active.tokens[-1] += 1  # type: ignore[attr-defined]

    monkeypatch.setattr(Scheduler, "_add_token", spoilt)
    found = explore.planned(Mode.LIVE, {})
    assert any("one engine" in problem for problem in found.problems)
    assert Fate.NORMAL not in found.plan.values()
