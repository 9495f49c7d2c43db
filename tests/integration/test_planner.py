# SPDX-License-Identifier: Apache-2.0
"""Dynamo's own planner with the migration plugin, on a running graph: without a model, and on vLLM."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.graphs import PAGED, PROMPT, Graph

pytestmark = [pytest.mark.integration, pytest.mark.slow]
POLICY = """
limits: {cooldown-s: 0, no-return-s: 600}
cost: {min-gain: 0}
policies:
  drain: {}
  balance: {high: 0.1, start-gap: 0.15, stop-gap: 0.05}
"""


@pytest.fixture(scope="module", params=["paged", "vllm"])
def planned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Graph]:
    folder = tmp_path_factory.mktemp(f"planner-{request.param}")
    policy = folder / "policy.yaml"
    policy.write_text(POLICY)
    own = (f"--Planner.policy-file={policy}", "--Planner.interval-s=1", "--Planner.decode-workers=[2,2]")
    graph = Graph(folder, "planner", (*own, *(PAGED if request.param == "paged" else ())))
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


def test_top_shows_what_the_planner_has_decided_and_why(planned: Graph) -> None:
    shown = planned.command("top", "--once")
    assert shown.returncode == 0, shown.stderr
    table = shown.stdout[shown.stdout.index("planner") :]
    moved = next(m for m in planned.status()["moves"] if m["ok"])
    assert f"{moved['source']} → {moved['target']}" in table
    assert "balance" in table and "usage" in table


def test_explain_shows_the_live_system_and_a_saved_one(planned: Graph, tmp_path: Path) -> None:
    saved = str(tmp_path / "seen.json")
    live = planned.command("policy", "explain", "--save", saved, "--json")
    assert live.returncode == 0, live.stderr
    again = planned.command("policy", "explain", "--snapshot", saved, "--json")
    assert json.loads(again.stdout) == json.loads(live.stdout)
    assert "balance" in json.loads(live.stdout)
