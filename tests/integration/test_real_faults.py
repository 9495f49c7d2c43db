# SPDX-License-Identifier: Apache-2.0
"""Seeded faults on a served graph (``tests/faults/real``): kill and stop of every process, also etcd and NATS.

``DYNAMO_MIGRATE_TEST_FAULTS`` is the number of runs on the paged engine (100) and, divided by ten, on vLLM.
"""

from __future__ import annotations

import os

import pytest

from tests.faults.real.__main__ import play
from tests.faults.real.run import Outcome

pytestmark = [pytest.mark.integration, pytest.mark.slow]
RUNS = int(os.environ.get("DYNAMO_MIGRATE_TEST_FAULTS", "100"))


@pytest.mark.parametrize(("engine", "runs"), [("paged", RUNS), ("vllm", RUNS // 10)])
def test_no_fault_changes_or_loses_an_answer_or_leaves_anything(engine: str, runs: int) -> None:
    outcomes: list[Outcome] = []
    play(outcomes, list(range(runs)), engine, each=25)
    assert [(o.seed, o.fault, o.problems) for o in outcomes if o.problems] == []
