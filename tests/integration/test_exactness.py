# SPDX-License-Identifier: Apache-2.0
"""Many requests of all kinds, moved to and fro between three vLLM workers: answers equal those of unmoved ones.

30 requests by default; 100 for each model in the slow group. float32, so that batches do not change roundings.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.integration.graphs import Graph

pytestmark = pytest.mark.integration
AT_ONCE = 12
WORDS = ["sea", "clock", "house", "maker", "lived", "once", "upon", "time", "old", "small", "door", "river", "stone"]
GUIDED = "([a-z]{2,9} )+"
CASES = {
    "tiny-llama": ("tiny-llama", "false", 30, 300),
    "tiny-llama cached": ("tiny-llama", "true", 100, 200),
    "tiny-mixtral": ("tiny-mixtral", "false", 100, 200),
    "smollm2": ("smollm2", "false", 100, 100),
}


@dataclass(frozen=True)
class Answer:
    """What a client got."""

    text: str
    finish: str
    tokens: int
    logprobs: tuple[tuple[str, float], ...]


def kinds(number: int, chance: random.Random) -> dict[str, Any]:
    """The sampling of the request with this number."""
    seeded = {"temperature": round(chance.uniform(0.5, 1.2), 2), "seed": chance.randrange(1000)}
    return (
        {"temperature": 0},
        seeded,
        seeded | {"top_p": 0.9, "extra_body": {"top_k": 40, "min_p": 0.01}},
        seeded | {"presence_penalty": 0.5, "frequency_penalty": 0.3, "extra_body": {"repetition_penalty": 1.1}},
        {"temperature": 0, "logprobs": 2},
        seeded | {"extra_body": {"min_tokens": 100}},
        {
            "temperature": 0,
            "frequency_penalty": 1.0,
            "stop": chance.sample(["e s", "ing t", "ion", "\n\n", ". The"], 3),
        },
        seeded | {"extra_body": {"guided_regex": GUIDED}},
    )[number % 8]


def request(number: int, length: int) -> dict[str, Any]:
    """The request with this number: a prompt of 1 to 400 words, its sampling, whole or streamed."""
    chance = random.Random(number)
    prompt = " ".join(chance.choices(WORDS, k=int(2 ** chance.uniform(0, 8.6))))
    if number == 0:
        prompt = "Count from 1 to 100: 1, 2, 3, 4,"
    body = {"prompt": f"{number} {prompt}" if number else prompt, "max_tokens": length} | kinds(number, chance)
    more = dict(body.pop("extra_body", {}))
    if "stop" not in body:
        more["ignore_eos"] = True
    return body | {"extra_body": more, "stream": number // 8 % 2 == 1}


def ask(graph: Graph, body: dict[str, Any]) -> Answer:
    more = {"stream_options": {"include_usage": True}} if body["stream"] else {}
    reply = graph.client.completions.create(model=graph.model, **body, **more)
    text, finish, tokens, logprobs = "", "", 0, []
    for part in reply if body["stream"] else [reply]:
        tokens = part.usage.completion_tokens if part.usage else tokens
        for choice in part.choices:
            text += choice.text
            finish = choice.finish_reason or finish
            if choice.logprobs:
                logprobs += zip(choice.logprobs.tokens, choice.logprobs.token_logprobs, strict=True)
    return Answer(text, finish, tokens, tuple(logprobs))


def shuffle(graph: Graph, answers: list[Future[Answer]]) -> list[dict[str, Any]]:
    """Move whatever decodes to the next of the workers, again and again, until all answers are there."""
    modes = itertools.cycle(["live", "live", "stop-and-copy"])
    decode = sorted(graph.decoding())
    moves: list[dict[str, Any]] = []
    moved_to: dict[str, str] = {}
    while not all(answer.done() for answer in answers):
        asked = []
        for request_id, running in graph.running().items():
            here = running["worker"]
            # A table that is older than the last move tells where the request was.
            if running["output_tokens"] > 5 and moved_to.get(request_id, here) == here:
                target = decode[(decode.index(here) + 1) % len(decode)]
                asked.append((request_id, here, target, next(modes)))
        found = graph.ask("migrate all", *map(json.dumps, asked))
        moved_to |= {r: target for (r, _, target, _), move in zip(asked, found, strict=True) if move.get("ok")}
        moves += found
        time.sleep(0.02)
    return moves


@pytest.mark.parametrize(
    "case", [next(iter(CASES)), *(pytest.param(c, marks=pytest.mark.slow) for c in list(CASES)[1:])]
)
def test_moved_requests_give_what_unmoved_ones_give(case: str, tmp_path: Path) -> None:
    model, caching, count, length = CASES[case]
    overrides = ("--DecodeWorker.replicas=3", f"--Common.enable-prefix-caching={caching}", "--Common.kv-memory-gib=0.5")
    graph = Graph(tmp_path, overrides=overrides, model=model)
    try:
        graph.wait()
        compare(graph, [request(number, length) for number in range(count)])
        graph.wait_until_idle(workers=4)
    finally:
        assert graph.stop() == []


def compare(graph: Graph, bodies: list[dict[str, Any]]) -> None:
    began = time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        moved = [pool.submit(ask, graph, body) for body in bodies]
        moves = shuffle(graph, moved)
    between = time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        unmoved = list(pool.map(lambda body: ask(graph, body), bodies))
    done = [move for move in moves if move.get("ok")]
    print(f"{len(bodies)} requests, {len(done)} moves, {len(moves) - len(done)} refused, moved in", end=" ")
    print(f"{between - began:.0f} s, unmoved in {time.monotonic() - between:.0f} s")
    for body, one, other in zip(bodies, moved, unmoved, strict=True):
        found = one.result()
        assert (found.text, found.finish, found.tokens) == (other.text, other.finish, other.tokens), body
        assert "guided_regex" not in body["extra_body"] or re.fullmatch("[a-z ]+", found.text), (body, found.text)
        assert [token for token, _ in found.logprobs] == [token for token, _ in other.logprobs], body
        assert [p for _, p in found.logprobs] == pytest.approx([p for _, p in other.logprobs], abs=1e-3), body
    assert len(done) > len(bodies), moves
    assert not [move for move in done if move.get("reason")], "moved by other means than asked"
