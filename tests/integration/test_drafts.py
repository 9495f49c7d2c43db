# SPDX-License-Identifier: Apache-2.0
"""Workers of Dynamo that decode speculatively: served, and moved without a token changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.graphs import PROMPT, Graph

pytestmark = [pytest.mark.integration, pytest.mark.slow]
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 2, "prompt_lookup_max": 4}


def test_requests_move_between_workers_that_decode_speculatively(tmp_path: Path) -> None:
    engine = json.dumps({"speculative-config": DRAFTS})
    overrides = ("--AggWorker.replicas=2", "--AggWorker.kv-memory-gib=0.25", f"--AggWorker.engine-args={engine}")
    graph = Graph(tmp_path, "agg", overrides)
    try:
        graph.wait()

        def move(where: dict[str, str]) -> None:
            for request, worker in where.items():
                there = graph.another(worker)
                moves = [graph.ask("migrate", request, target, "live") for target in (there, worker, there)]
                assert all(m.get("ok") and m["mode"] == "live" for m in moves), moves

        graph.disturbed([f"{number} {PROMPT}" for number in range(4)], 3000, move, temperature=0)
        graph.wait_until_idle(workers=2)
    finally:
        assert graph.stop() == []
