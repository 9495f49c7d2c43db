# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters behind the served graph: listed, chosen as a model, and kept when their requests move."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import openai
import pytest

from tests.adapters import make_adapter
from tests.integration.graphs import PROMPT, Graph

pytestmark = [pytest.mark.integration, pytest.mark.slow]
LENGTH = 2000


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory, tiny_llama: str) -> Iterator[Graph]:
    folder = tmp_path_factory.mktemp("lora")
    adapters = {name: make_adapter(folder / name, tiny_llama, seed) for seed, name in enumerate(("red", "blue"))}
    graph = Graph(folder, overrides=(f"--Common.lora-modules={adapters}",), model="tiny-llama")
    try:
        graph.wait()
        yield graph
    finally:
        graph.stop()


def test_adapters_are_models_of_their_own(graph: Graph) -> None:
    assert {model.id for model in graph.client.models.list()} == {"tiny-llama", "red", "blue"}
    texts = {model: graph.complete(PROMPT, 40, model=model, temperature=0) for model in ("tiny-llama", "red", "blue")}
    assert len(set(texts.values())) == 3
    with pytest.raises(openai.NotFoundError):
        graph.complete(PROMPT, 5, model="green")


@pytest.mark.parametrize("mode", ["live", "stop-and-copy", "replay"])
def test_a_request_keeps_its_adapter_when_it_moves(graph: Graph, mode: str) -> None:
    records = []

    def move(where: dict[str, str]) -> None:
        for request, source in where.items():
            records.append(graph.ask("migrate", request, graph.another(source), mode))

    prompts = [f"{mode} {number} {PROMPT}" for number in range(2)]
    for model in ("red", "blue"):
        moved = graph.under_way(prompts, LENGTH, move, model=model, temperature=0)
        assert moved == graph.complete_all(prompts, LENGTH, model=model, temperature=0)
    assert [(record["ok"], record["mode"]) for record in records] == [(True, mode)] * 4, records
    handed = Counter[str]()
    for worker in graph.status()["workers"]:
        handed.update(worker["handoffs"])
    assert handed["first_token_used"] > 0 and not handed["local_adapter"], handed
    graph.wait_until_idle()
