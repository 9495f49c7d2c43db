# SPDX-License-Identifier: Apache-2.0
"""Dynamo's own planner with the plugin over aggregated vLLM workers, whose requests Dynamo's KV routing places."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.integration.graphs import EAGER_POLICY, PROMPT, Graph

pytestmark = [pytest.mark.integration, pytest.mark.slow]
LENGTH = 800


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Graph]:
    folder = tmp_path_factory.mktemp("agg-planner")
    policy = folder / "policy.yaml"
    policy.write_text(EAGER_POLICY)
    graph = Graph(folder, "agg_planner", (f"--Planner.policy-file={policy}", "--Planner.interval-s=1"))
    with graph.served():
        yield graph


def test_the_planner_evens_out_two_workers_and_every_answer_is_as_undisturbed(planned: Graph) -> None:
    first, second = planned.decoding()
    prompts = [f"{i} {PROMPT}" for i in range(6)]
    assert planned.ask("drain", second) == []

    def bring_back(where: dict[str, str]) -> None:
        assert set(where.values()) == {first}
        planned.ask("undrain", second)

    planned.disturbed(prompts, LENGTH, bring_back, temperature=0)
    moves = [move for move in planned.status()["moves"] if move["ok"]]
    assert moves
    assert (moves[0]["source"], moves[0]["target"]) == (first, second)
    assert any(decision["policy"] == "balance" for decision in planned.status()["decisions"])
    planned.wait_until_idle(workers=2)


def test_the_next_turn_of_a_moved_session_goes_where_its_kv_is(planned: Graph) -> None:
    """The source keeps the prompt in its prefix cache; only the destination has the answer, as its KV events tell."""
    for number in range(2):
        prompt = f"session {number} {PROMPT}"
        moved: list[dict[str, str]] = []

        def move(where: dict[str, str], moved: list[dict[str, str]] = moved) -> None:
            [(request, source)] = where.items()
            moved.append(planned.ask("migrate", request, planned.another(source), "live"))

        [answer] = planned.under_way([prompt], LENGTH, move, temperature=0)
        [record] = moved
        assert record["ok"], record
        time.sleep(2.0)  # Events reach the router in batches.
        planned.wait_until_idle(workers=2)
        more = {"max_tokens": 300, "temperature": 0, "extra_body": {"ignore_eos": True}}
        with ThreadPoolExecutor(1) as pool:
            turn = pool.submit(
                planned.client.completions.create, model=planned.model, prompt=f"{prompt}{answer}", **more
            )
            while not (rows := planned.running()):
                assert not turn.done(), "it has ended before it was seen"
            assert [row["worker"] for row in rows.values()] == [record["target"]]
            usage = turn.result().usage
        assert usage is not None and usage.prompt_tokens_details is not None
        # Text does not always become the same tokens again: only the first part of the answer is certain to match.
        assert (usage.prompt_tokens_details.cached_tokens or 0) > record["tokens"], (usage, record)
    planned.wait_until_idle(workers=2)
