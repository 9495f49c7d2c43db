# SPDX-License-Identifier: Apache-2.0
"""Public bug reports again (docs/cases.md): requests of their kinds to a served graph, prefill and decode apart.

Each test has its number there in its name. Some only show the behaviour of Dynamo's own frontend, to notice a change.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.integration.features import BOOLEANS, TOOLS
from tests.integration.graphs import MODEL, Graph
from tests.integration.test_features import content, read

pytestmark = [pytest.mark.integration, pytest.mark.slow]
VOCABULARY = 49152
COUNT = "one two three four five six seven eight nine ten "
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": BOOLEANS}}
WORDS = "out-of-vocab|out of vocabulary|not in the model's vocabulary"


def post(graph: Graph, path: str, headers: dict[str, str] | None = None, **more: Any) -> httpx.Response:
    url = f"http://127.0.0.1:{graph.port}/v1/{path}"
    body = {"model": MODEL, "max_tokens": 8, **more}
    return httpx.post(url, json=body, headers=headers, timeout=120, trust_env=False)


def complete(graph: Graph, **more: Any) -> httpx.Response:
    return post(graph, "completions", **{"prompt": "The tea is", "temperature": 0, **more})


def chat(graph: Graph, **more: Any) -> httpx.Response:
    return post(graph, "chat/completions", **{"messages": [{"role": "user", "content": "x"}], **more})


def refused(reply: httpx.Response, words: str) -> None:
    """A client's error with a readable reason."""
    assert reply.status_code == 400 and re.search(words, reply.text), f"{reply.status_code} {reply.text}"


def text(reply: httpx.Response) -> str:
    return content(read(reply)["choices"][0])


@pytest.mark.parametrize("token", [VOCABULARY, 60_000, 2**32 - 1])
@pytest.mark.parametrize(
    "field",
    ["prompt", "stop_token_ids", "allowed_token_ids", "bad_words_token_ids", "logprob_token_ids"],
)
def test_f1_f2_a_token_that_the_model_does_not_have_is_refused(graph: Graph, field: str, token: int) -> None:
    value: Any = [[504, token]] if field == "bad_words_token_ids" else [504, token]
    more = {"logprobs": 2} if field == "logprob_token_ids" else {"min_tokens": 1}
    # Dynamo's frontend itself holds prompts against the model, and keeps its words to itself.
    refused(complete(graph, **{field: value}, **more), "Invalid request" if field == "prompt" else WORDS)
    assert graph.complete("The tea is", 2)


@pytest.mark.parametrize("field", ["prompt", "stop_token_ids", "allowed_token_ids", "logprob_token_ids"])
@pytest.mark.parametrize("value", [[-1], [2**32], [504, "a"], [1.5]])
def test_f1_f2_what_is_no_token_is_refused(graph: Graph, field: str, value: list[Any]) -> None:
    assert complete(graph, **{field: value}).status_code in (400, 422)


def test_f1_f2_names_of_adapters_and_salts(graph: Graph) -> None:
    assert complete(graph, model="no-such-adapter").status_code == 404
    refused(complete(graph, cache_salt=5), "cache_salt")
    for salt in ("", "x" * 100_000, "\x00"):
        assert complete(graph, nvext={"cache_salt": salt}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("asked", "fits"),
    [
        ({"guided_regex": "[ab]{5}"}, "[ab]{5}"),
        ({"guided_choice": ["red", "blue"]}, "red|blue"),
        ({"guided_grammar": 'root ::= "yes" | "no"'}, "yes|no"),
        ({"guided_json": BOOLEANS}, r"\{[\s\S]*"),
        ({"response_format": SCHEMA}, r"\{[\s\S]*"),
        ({"response_format": {"type": "json_object"}}, r"\{[\s\S]*"),
        ({"tools": TOOLS, "tool_choice": "required"}, r"[\s\S]*"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "say"}}}, r"[\s\S]*"),
    ],
)
def test_f3_guided_decoding_of_every_kind(graph: Graph, asked: dict[str, Any], fits: str, stream: bool) -> None:
    reply = chat(graph, temperature=0, max_tokens=700, stream=stream, **asked)
    assert re.fullmatch(fits, text(reply)), reply.text


@pytest.mark.parametrize(
    "asked", [{"guided_json": {"type": "nonsense"}}, {"guided_regex": "[ab"}, {"guided_grammar": "root ::= ("}]
)
def test_f3_a_grammar_that_is_none_is_refused(graph: Graph, asked: dict[str, Any]) -> None:
    refused(chat(graph, **asked), "(?i)json|schema|regex|grammar")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"top_p": 0, "temperature": 1}, "(?i)top_p"),
        ({"min_tokens": 100, "max_tokens": 5}, "min_tokens"),
        ({"prompt": "word " * 6000}, "4096"),
        ({"nvext": {"max_thinking_tokens": 5}}, "reasoning"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_f4_what_vllm_refuses_is_told_at_once(graph: Graph, asked: dict[str, Any], words: str, stream: bool) -> None:
    reply = complete(graph, stream=stream, **asked)
    if stream and reply.status_code == 200:
        # The head of the answer was sent before the worker had seen the request.
        assert '"code":400' in reply.text and re.search(words, reply.text), reply.text
    else:
        refused(reply, words)


def test_f9_token_ids_are_honoured(graph: Graph) -> None:
    assert set(text(complete(graph, allowed_token_ids=[39529])).split()) == {"whispered"}
    plain, without = text(complete(graph)), text(complete(graph, bad_words_token_ids=[[2851]]))
    assert plain != without and plain.split()[0] not in without
    rows = read(complete(graph, logprobs=2, logprob_token_ids=[39529, 2851]))["choices"][0]["logprobs"]["top_logprobs"]
    assert all(" whispered" in row for row in rows)


def test_f10_log_probabilities_of_the_prompt(graph: Graph) -> None:
    reply = read(complete(graph, max_tokens=1, prompt_logprobs=1, nvext={"extra_fields": ["prompt_logprobs"]}))
    assert len(reply["nvext"]["prompt_logprobs"]) == reply["usage"]["prompt_tokens"]


def test_f12_alternatives_are_the_best_ones_beside_the_chosen_token(graph: Graph) -> None:
    for wanted in (0, 2, 5):
        answer = read(chat(graph, temperature=2, seed=2, logprobs=True, top_logprobs=wanted))
        for entry in answer["choices"][0]["logprobs"]["content"]:
            others = [top for top in entry["top_logprobs"] if top["token"] != entry["token"]]
            assert len(others) in {max(0, wanted - 1), wanted}
            assert others == sorted(others, key=lambda top: -top["logprob"])


def test_f14_without_a_worker_clients_are_told_to_come_again(graph: Graph) -> None:
    workers = graph.decoding()
    try:
        for worker in workers:
            graph.ask("drain", worker)
        reply = complete(graph)
        assert reply.status_code == 503, reply.text
    finally:
        for worker in workers:
            graph.ask("undrain", worker)
    graph.wait_until_idle()
    assert graph.complete("The tea is", 2)


def test_f22_too_many_stops_and_two_grammars(graph: Graph) -> None:
    assert complete(graph, stop=["a", "b", "c", "d", "e"]).status_code == 200
    refused(complete(graph, stop_token_ids=list(range(33))), "32")
    refused(chat(graph, guided_regex="[ab]", guided_choice=["a"]), "constraint")


@pytest.mark.parametrize(
    "asked",
    [
        {"logit_bias": {"33738": -100}},
        {"echo": True},
        {"suffix": "x"},
        {"best_of": 2},
        {"ignore_eos": True, "stop": ["conceptions"]},
        {"ignore_eos": True, "stop_token_ids": [33738]},
    ],
)
def test_f23_f24_what_dynamos_frontend_leaves_out(graph: Graph, asked: dict[str, Any]) -> None:
    assert text(complete(graph, **asked)) == text(complete(graph))


@pytest.mark.parametrize("header", ["x-request-id", "x-dynamo-request-id"])
def test_f25_one_id_for_several_requests(graph: Graph, header: str) -> None:
    def one(_: int) -> int:
        return post(graph, "completions", {header: "same"}, prompt="a", max_tokens=40, ignore_eos=True).status_code

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(one, range(4))) == {200}
    graph.wait_until_idle()


def test_f26_an_image_for_a_text_model_is_refused(graph: Graph) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    assert chat(graph, messages=[{"role": "user", "content": [image]}]).status_code == 400


def test_embeddings_are_refused_as_by_stock_dynamo(graph: Graph) -> None:
    assert post(graph, "embeddings", input="x").status_code == 404
    assert complete(graph, prompt_embeds="A" * 400).status_code == 400


@pytest.fixture
def streamed(graph: Graph) -> Iterator[httpx.Response]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": 1500}
    body |= {"guided_regex": f"({COUNT}){{100}}end", "temperature": 0}
    url = f"http://127.0.0.1:{graph.port}/v1/chat/completions"
    with httpx.Client(timeout=240, trust_env=False) as client, client.stream("POST", url, json=body) as reply:
        yield reply


def test_f11_a_lost_worker_ends_a_guided_answer_and_does_not_mix_it(graph: Graph, streamed: httpx.Response) -> None:
    read_so_far, finish, killed = "", "", False
    for line in streamed.iter_lines():
        if line.startswith("data: {"):
            chunk = json.loads(line[6:])
            for choice in chunk.get("choices", []):
                read_so_far += choice["delta"].get("content") or ""
                finish = choice.get("finish_reason") or finish
        if len(read_so_far) > 200 and not killed:
            # A table that is read may be a second old.
            rows = [row for row in graph.running().values() if row["max_tokens"] == 1500]
            if rows:
                graph.worker_process(graph.replica_of(rows[0]["worker"])).kill()
                killed = True
    whole = COUNT * 100 + "end"
    assert killed and whole.startswith(read_so_far)
    assert finish != "stop" or read_so_far == whole
    graph.wait_until_idle(timeout_s=180)
