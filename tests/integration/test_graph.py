# SPDX-License-Identifier: Apache-2.0
"""The served graph as a user sees it: OpenAI's client, migration under a running stream."""

from __future__ import annotations

import json

import openai
import pytest

from tests.integration.graphs import MODEL, PROMPT, Graph

pytestmark = [pytest.mark.integration, pytest.mark.slow]
GREEDY: dict[str, float] = {"temperature": 0}
SEEDED: dict[str, float] = {"temperature": 0.8, "seed": 3}


def test_chat_streams_and_answers_alike(graph: Graph) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 20}
    whole = graph.client.chat.completions.create(**body, temperature=0)
    parts = list(graph.client.chat.completions.create(**body, temperature=0, stream=True))
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content
    assert whole.usage is not None and 0 < whole.usage.completion_tokens <= 20


def test_seeded_requests_repeat(graph: Graph) -> None:
    first = graph.complete("Tell me", 30, temperature=0.9, seed=5)
    assert graph.complete("Tell me", 30, temperature=0.9, seed=5) == first
    assert graph.complete("Tell me", 30, temperature=0.9, seed=6) != first


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("mode", ["live", "stop-and-copy", "replay"])
def test_a_migrated_stream_gives_the_text_of_an_unmigrated_one(
    graph: Graph, mode: str, sampling: dict[str, float]
) -> None:
    prompt = f"{mode} {sampling} {PROMPT}"
    moves = []

    def move(where: dict[str, str]) -> None:
        [(request, source)] = where.items()
        moves.append(graph.ask("migrate", request, graph.another(source), mode))

    [moved] = graph.under_way([prompt], 1500, move, **sampling)
    assert moves[0].get("ok") and moves[0]["mode"] == mode, json.dumps(moves[0])
    assert 0 < moves[0]["tokens"] < 1500
    assert moved == graph.complete(prompt, 1500, **sampling)


def test_wrong_requests_get_openai_errors(graph: Graph) -> None:
    with pytest.raises(openai.NotFoundError):
        graph.client.completions.create(model="no-such-model", prompt="x")
    # Dynamo's frontend keeps a worker's reason to its log.
    with pytest.raises(openai.BadRequestError, match="Invalid request"):
        graph.client.completions.create(model=MODEL, prompt="word " * 6000, max_tokens=5)


def test_commands_name_what_is_wrong(graph: Graph) -> None:
    done = graph.command("migrate", "no-such-request", "--to", "0")
    assert done.returncode == 2
    assert "error: no running requests begin with 'no-such-request'" in done.stderr


def test_nothing_is_left_on_the_workers(graph: Graph) -> None:
    graph.wait_until_idle()
