# SPDX-License-Identifier: Apache-2.0
"""Dynamo's own planner with the migration plugin, on a running graph: without a model, and on vLLM."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests.integration.browser import chromium, keep
from tests.integration.graphs import EAGER_POLICY, PAGED, PROMPT, Graph

pytestmark = [pytest.mark.integration, pytest.mark.slow]
CROWDED = (*PAGED, "--DecodeWorker.engine-args={step_s: 0.004, num_blocks: 640}")
"""Few KV blocks, so that a handful of requests fills a good part of them."""


@pytest.fixture(scope="module", params=["paged", "vllm"])
def planned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Graph]:
    folder = tmp_path_factory.mktemp(f"planner-{request.param}")
    policy = folder / "policy.yaml"
    policy.write_text(EAGER_POLICY)
    own = (f"--Planner.policy-file={policy}", "--Planner.interval-s=1", "--Planner.decode-workers=[2,2]")
    graph = Graph(folder, "planner", (*own, *(CROWDED if request.param == "paged" else ())))
    with graph.served():
        yield graph


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
    assert (moves[0]["source"], moves[0]["target"]) == (first, second)


def test_the_page_shows_the_planners_moves_and_reasons(planned: Graph) -> None:
    first, second = [w["worker"] for w in planned.status()["workers"] if w["role"] == "decode"]
    before = len(planned.status()["moves"])
    planned.ask("drain", second)
    with chromium() as browser, ThreadPoolExecutor(8) as pool:
        browser.get(planned.page)
        running = [pool.submit(planned.complete, f"page {i} {PROMPT}", 1200 + 200 * i, temperature=0) for i in range(8)]
        while sum(s["output_tokens"] > 5 for s in planned.running().values()) < len(running):
            assert not any(text.done() for text in running), [text.result() for text in running if text.done()]
        planned.ask("undrain", second)
        wait = WebDriverWait(browser, 60)
        wait.until(lambda _: len([m for m in planned.status()["moves"][before:] if m["ok"]]) >= 3)
        wait.until(lambda b: "balance" in b.find_element(By.ID, "decisions").text)
        wait.until(lambda b: len(b.find_elements(By.CSS_SELECTOR, "#moves td.done")) >= 3)
        time.sleep(3)  # For the picture: the charts show what the moves did.
        keep(browser, "dashboard.png")
        for text in running:
            text.result(300)


def test_top_shows_what_the_planner_has_decided_and_why(planned: Graph) -> None:
    shown = planned.command("top", "--once")
    assert shown.returncode == 0, shown.stderr
    table = shown.stdout[shown.stdout.index("planner") :]
    moved = next(m for m in planned.status()["moves"] if m["ok"])
    assert f"{moved['source']} → {moved['target']}" in table
    assert "balance" in table and "usage" in table


def test_explain_shows_the_live_system_and_a_saved_one(planned: Graph, tmp_path: Path) -> None:
    saved = str(tmp_path / "seen.json")
    live = planned.command("policy", "explain", "--save", saved, "-o", "json")
    assert live.returncode == 0, live.stderr
    again = planned.command("policy", "explain", "--snapshot", saved, "-o", "json")
    assert json.loads(again.stdout) == json.loads(live.stdout)
    assert "balance" in json.loads(live.stdout)
