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
    graph = Graph(tmp_path, "agg", ("--Common.max-model-len=8192", *overrides))
    try:
        graph.wait()

        def move(where: dict[str, str]) -> None:
            """All at once, three times each, or until they end: accepted drafts make an answer many times as fast."""
            moves = []
            for _ in range(3):
                to = {request: graph.another(worker) for request, worker in where.items()}
                asked = [json.dumps((request, where[request], to[request], "live")) for request in to]
                made = list(zip(to, graph.ask("migrate all", *asked), strict=True))
                moves += [move for _, move in made]
                where = {request: to[request] for request, move in made if move.get("ok")}
            there = [move for move in moves if move.get("ok")]
            assert all(move["mode"] == "live" for move in there), moves
            ended = [move for move in moves if not move.get("ok")]
            assert {move.get("error") or move["code"] for move in ended} <= {"request_not_found"}, moves
            assert len(there) >= 4, moves

        graph.disturbed([f"{number} {PROMPT}" for number in range(4)], 6000, move, temperature=0)
        graph.wait_until_idle(workers=2)
    finally:
        assert graph.stop() == []
