# SPDX-License-Identifier: Apache-2.0
"""Random faults from seeds: see ``tests/faults``. Play a failed one again: ``python -m tests.faults --seed N``."""

from __future__ import annotations

import pytest

from tests.faults.scenario import run

_SHARE = 20


@pytest.mark.parametrize("first", range(0, 60, _SHARE))
def test_no_seed_loses_or_changes_a_token_hangs_or_leaks(first: int) -> None:
    for seed in range(first, first + _SHARE):
        outcome = run(seed)
        assert outcome.problems == [], outcome


@pytest.mark.slow
@pytest.mark.parametrize("first", range(60, 1060, 100))
def test_a_thousand_more(first: int) -> None:
    for seed in range(first, first + 100):
        outcome = run(seed)
        assert outcome.problems == [], outcome
