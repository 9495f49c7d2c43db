# SPDX-License-Identifier: Apache-2.0
"""Every row of docs/features.md on one served graph: three vLLM workers, Dynamo's own frontend.

All requests run at once, and each gets a command to move in the middle of its answer. A moved request must give the
answer of an unmoved one; a request that cannot move has a reason and continues.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tests.integration.features import FEATURES, ITEMS, Asked
from tests.integration.graphs import PROMPT, Graph

pytestmark = [pytest.mark.integration, pytest.mark.slow]
LENGTH = 500
ROWS = {
    " ".join(filter(None, (feature, kind))): asked
    for feature, row in FEATURES.items()
    for kind, asked in row.asked.items()
}


@dataclass
class Told:
    """What became of one request."""

    answer: dict[str, Any] = field(default_factory=dict)
    """Without a move."""
    moved: dict[str, Any] = field(default_factory=dict)
    """With one, or with the try."""
    record: dict[str, Any] = field(default_factory=dict)
    row: dict[str, Any] = field(default_factory=dict)
    """In the worker's table, when it was asked to move."""


def read(reply: httpx.Response) -> dict[str, Any]:
    """The answer as one dictionary, whole or streamed."""
    assert reply.status_code == 200, reply.text
    if not reply.headers["content-type"].startswith("text/event-stream"):
        return dict(reply.json())
    text, finish, usage = "", "", None
    for line in reply.text.splitlines():
        assert not line.startswith("event: error"), reply.text
        if line.startswith("data: {"):
            chunk = json.loads(line[6:])
            assert "error" not in chunk, chunk
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                text += choice.get("text") or choice.get("delta", {}).get("content") or ""
                finish = choice.get("finish_reason") or finish
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish}], "usage": usage}


def ask(graph: Graph, body: dict[str, Any], chat: bool = False) -> dict[str, Any]:
    """One request and its answer."""
    url = f"http://127.0.0.1:{graph.port}/v1/{'chat/completions' if chat else 'completions'}"
    return read(httpx.post(url, json=body, timeout=240, trust_env=False))


def body(asked: Asked, number: int, name: str) -> dict[str, Any]:
    """What is sent for a row. Its length is its name in the workers' tables."""
    fixed: dict[str, Any] = {"model": "tiny-llama", "max_tokens": LENGTH + number}
    if asked.chat:
        return fixed | {"messages": [{"role": "user", "content": f"{name} {PROMPT}"}]} | asked.body
    return fixed | {"prompt": f"{name} {PROMPT}", "ignore_eos": True} | asked.body


def content(choice: dict[str, Any]) -> str:
    """Text of one choice, or the arguments of its tool call."""
    message = choice.get("message") or {}
    calls = message.get("tool_calls") or []
    return str(calls[0]["function"]["arguments"] if calls else choice.get("text") or message.get("content") or "")


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Graph]:
    folder = tmp_path_factory.mktemp("features")
    thinking = {"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"}
    engine: dict[str, Any] = {"reasoning-config": thinking}
    # Random weights like blanks better than the end of an answer.
    engine["structured-outputs-config"] = {"backend": "xgrammar", "disable_any_whitespace": True}
    overrides = (
        "--AggWorker.replicas=3",
        "--AggWorker.kv-memory-gib=0.5",
        # Two of three workers have seats for all.
        "--AggWorker.max-num-seqs=32",
        f"--AggWorker.engine-args={json.dumps(engine)}",
    )
    graph = Graph(folder, "agg", overrides, model="tiny-llama")
    try:
        graph.wait()
        yield graph
        graph.wait_until_idle()
        assert graph.stop() == []
    finally:
        graph.stop()


@pytest.fixture(scope="module")
def told(graph: Graph) -> dict[str, Told]:
    """All requests, moved and not."""
    bodies = {name: body(asked, number, name) for number, (name, asked) in enumerate(ROWS.items())}
    late = bodies["stop strings"]
    text = content(ask(graph, {key: value for key, value in late.items() if key != "stop"})["choices"][0])
    late["stop"] = [text[int(len(text) * 0.8) :][:12]]
    worker = ask(graph, bodies["sampling greedy"] | {"max_tokens": 2, "nvext": {"extra_fields": ["worker_id"]}})
    chosen = worker["nvext"]["worker_id"]["decode_worker_id"]
    bodies["worker chosen by the client"]["nvext"] = {"backend_instance_id": chosen}
    found = {name: Told() for name in ROWS}
    for names in ([n for n, asked in ROWS.items() if not asked.alone], [n for n, asked in ROWS.items() if asked.alone]):
        with ThreadPoolExecutor(len(names)) as pool:
            running = {name: pool.submit(ask, graph, bodies[name], ROWS[name].chat) for name in names}
            while not all(answer.done() for answer in running.values()):
                move_what_runs(graph, found)
                time.sleep(0.05)
            for name, answer in running.items():
                found[name].moved = outcome(answer)
            after = {name: pool.submit(ask, graph, bodies[name], ROWS[name].chat) for name in names}
            for name, answer in after.items():
                found[name].answer = outcome(answer)
    return found


def outcome(answer: Future[dict[str, Any]]) -> dict[str, Any]:
    """What came of one request; an error is that row's alone."""
    try:
        return answer.result()
    except (AssertionError, httpx.HTTPError) as error:
        return {"error": str(error)}


def move_what_runs(graph: Graph, found: dict[str, Told]) -> None:
    """Ask every request to move that has not been asked yet."""
    names, workers = list(found), graph.decoding()
    asked = []
    for request, row in graph.running().items():
        number = (row.get("max_tokens") or 0) - LENGTH
        if 0 <= number < len(names) and row["output_tokens"] > 5 and not found[names[number]].row:
            target = workers[(workers.index(row["worker"]) + 1) % len(workers)]
            asked.append((found[names[number]], row, json.dumps([request, row["worker"], target, "live"])))
    if asked:
        for (told, row, _), record in zip(
            asked, graph.ask("migrate all", *(move for _, _, move in asked)), strict=True
        ):
            # One whose table was old may have ended.
            if "error" not in record:
                told.row, told.record = row, record


@pytest.mark.parametrize("name", list(ROWS))
def test_it_is_served_and_moves_or_says_why_not(told: dict[str, Told], name: str) -> None:
    asked, found = ROWS[name], told[name]
    assert "error" not in found.moved and "error" not in found.answer, (found.moved, found.answer)
    assert found.row, f"it ended before it was asked to move: {found.moved}"
    if asked.stays:
        assert found.record.get("code") == "not_migratable" and asked.stays in found.record["reason"], found.record
        assert asked.stays in found.row.get("not_migratable", "")
    else:
        assert found.record.get("ok") and found.record["mode"] == "live", "{code}: {reason}".format_map(found.record)
    same(found.moved, found.answer)
    texts = [content(choice) for choice in found.moved["choices"]]
    if asked.fits:
        assert re.fullmatch(asked.fits, texts[0]), texts
    assert asked.holds in texts[0]


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Two answers to the same request, but for ids, times and what was in a cache."""
    assert [content(choice) for choice in one["choices"]] == [content(choice) for choice in other["choices"]]
    for a, b in zip(one["choices"], other["choices"], strict=True):
        assert a["finish_reason"] == b["finish_reason"]
        assert close(a.get("logprobs"), b.get("logprobs"))
    # A stream tells its usage only when it is asked to.
    for key in ("prompt_tokens", "completion_tokens"):
        assert (one["usage"] or {}).get(key) == (other["usage"] or {}).get(key)


def close(one: Any, other: Any) -> bool:
    """Are they equal but for roundings?"""
    if isinstance(one, float) and isinstance(other, float):
        return one == pytest.approx(other, abs=1e-3)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(close, one, other))
    return bool(one == other)


def test_a_higher_priority_is_a_lower_number_for_vllm(told: dict[str, Told]) -> None:
    assert told["priority"].row["priority"] == -3
    assert told["sampling greedy"].row.get("priority", 0) == 0


def test_answers_with_json_fit_their_schema(told: dict[str, Told]) -> None:
    for kind in ("json", "json_schema", "tool_choice required", "tool_choice named"):
        answer = told[f"guided decoding {kind}"].moved["choices"][0]
        # After one call more calls may follow.
        ends = ("stop", "tool_calls", "length") if kind == "tool_choice required" else ("stop", "tool_calls")
        assert answer["finish_reason"] in ends, answer
        assert len(json.loads(content(answer))["a"]) == ITEMS


def test_all_samples_come_with_their_own_index(told: dict[str, Told]) -> None:
    choices = told["n"].moved["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]
    assert len({content(choice) for choice in choices}) == 2


def test_engine_data_is_of_the_whole_answer(told: dict[str, Told]) -> None:
    found = told["extra_args, engine data"]
    for answer in (found.moved, found.answer):
        tokens = answer["nvext"]["engine_data"]["completion_token_ids"]
        assert len(tokens) == answer["usage"]["completion_tokens"]


def test_moved_requests_are_billed_for_what_their_first_worker_had_cached(told: dict[str, Told]) -> None:
    # These two had been asked for before.
    for name in told.keys() - {"stop strings", "sampling greedy"}:
        details = (told[name].moved["usage"] or {}).get("prompt_tokens_details") or {}
        assert not details.get("cached_tokens"), name


def test_log_probabilities_of_the_prompt_come_once(told: dict[str, Told]) -> None:
    rows = told["prompt_logprobs"].moved["nvext"]["prompt_logprobs"]
    assert len(rows) == told["prompt_logprobs"].moved["usage"]["prompt_tokens"]


def test_a_response_is_one_of_the_chat(graph: Graph) -> None:
    url = f"http://127.0.0.1:{graph.port}/v1/responses"
    reply = httpx.post(url, json={"model": "tiny-llama", "input": "x", "max_output_tokens": 5}, trust_env=False)
    assert reply.status_code == 200 and reply.json()["output"][0]["content"][0]["text"]
