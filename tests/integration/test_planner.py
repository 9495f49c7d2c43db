# SPDX-License-Identifier: Apache-2.0
"""Dynamo's own planner with the migration plugin, on a running graph."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.graphs import PROMPT, Graph

pytestmark = [pytest.mark.integration, pytest.mark.slow]
POLICY = """
limits: {cooldown-s: 0, no-return-s: 600}
cost: {min-gain: 0}
policies:
  drain: {}
  balance: {high: 0.1, start-gap: 0.15, stop-gap: 0.05}
"""


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Graph]:
    folder = tmp_path_factory.mktemp("planner")
    policy = folder / "policy.yaml"
    policy.write_text(POLICY)
    graph = Graph(
        folder,
        "planner",
        (f"--Planner.policy-file={policy}", "--Planner.interval-s=1", "--Planner.decode-workers=[2,2]"),
    )
    try:
        graph.wait()
        yield graph
        assert graph.stop() == []
    finally:
        if graph.process.poll() is None:
            graph.stop()


def test_the_planner_evens_out_two_workers(planned: Graph) -> None:
    first, second = [w["worker"] for w in planned.status()["workers"] if w["role"] == "decode"]
    prompts = [f"{i} {PROMPT}" for i in range(6)]
    assert planned.ask("drain", second) == []

    def bring_back(where: dict[str, str]) -> None:
        assert set(where.values()) == {first}
        planned.ask("undrain", second)

    planned.disturbed(prompts, 1000, bring_back, temperature=0)
    moves = [m for m in planned.status()["moves"] if m["ok"]]
    assert moves
    assert {(m["source"], m["target"]) for m in moves} == {(first, second)}


def test_explain_shows_the_live_system_and_a_saved_one(planned: Graph, tmp_path: Path) -> None:
    saved = str(tmp_path / "seen.json")
    live = planned.command("policy", "explain", "--save", saved, "--json")
    assert live.returncode == 0, live.stderr
    again = planned.command("policy", "explain", "--snapshot", saved, "--json")
    assert json.loads(again.stdout) == json.loads(live.stdout)
    assert "balance" in json.loads(live.stdout)
