# SPDX-License-Identifier: Apache-2.0
"""Any death in a session: no wrong token, no lost request, nothing left; see ``tests.faults.deaths``.

``DYNAMO_MIGRATE_TEST_SEEDS`` is the number of runs (one for each pair of state and victim).
"""

from __future__ import annotations

import os

import pytest

from tests.faults.deaths import PAIRS, Victim, play

SEEDS = int(os.environ.get("DYNAMO_MIGRATE_TEST_SEEDS", str(len(PAIRS))))


@pytest.mark.parametrize("victim", list(Victim))
def test_a_death_in_any_state_costs_no_token_and_leaves_nothing(victim: Victim) -> None:
    outcomes = [play(seed) for seed in range(SEEDS) if PAIRS[seed % len(PAIRS)][1] is victim]
    assert [(o.seed, o.state, o.problems) for o in outcomes if o.problems] == []
    assert any(o.died for o in outcomes)
