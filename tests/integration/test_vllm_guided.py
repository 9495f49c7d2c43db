# SPDX-License-Identifier: Apache-2.0
"""Guided requests that move five times between two real vLLM engines: each text is valid and equal to the unmoved one.

JSON schemas, tool calls, regular expressions, grammars and choices; 10 of them by default, 50 in the slow group, and
there with guidance and outlines besides xgrammar.
"""

from __future__ import annotations

import asyncio
import functools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jsonschema
import msgspec
import pytest
from transformers import AutoTokenizer
from vllm.sampling_params import StructuredOutputsParams

from benchmarks.migration.sampled import native_of
from components.engine.kv import RequestId
from components.engine.protocol import FinishReason, GenerateRequest, Sampling
from tests.integration.moves import Client, empty, move, request_of, run, take_until
from tests.integration.vllm_engines import Pair, start_pair

pytestmark = pytest.mark.integration
MOVES = 5


@dataclass(frozen=True)
class Case:
    """What guides a request, and what its text must then be."""

    guided: dict[str, Any]
    valid: Callable[[str], object]


def schema(fields: dict[str, Any]) -> Case:
    closed = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    return _json(closed)


def _json(wanted: dict[str, Any]) -> Case:
    return Case({"json": wanted}, lambda text: jsonschema.validate(json.loads(text), wanted) is None)


def tools(count: int) -> Case:
    """As Dynamo's frontend asks for ``tool_choice: required``."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"enum": [f"tool_{n}"]},
                "parameters": {
                    "type": "object",
                    "properties": {"place": _string(n + 4), "units": {"enum": ["metric", "imperial"]}},
                    "required": ["place", "units"],
                    "additionalProperties": False,
                },
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for n in range(count)
    ]
    return _json({"type": "array", "minItems": 8, "maxItems": 9, "items": {"anyOf": calls}})


def regex(pattern: str) -> Case:
    return Case({"regex": pattern}, re.compile(pattern).fullmatch)


def grammar(size: int) -> Case:
    """Nested sums; no JSON and no regular expression."""
    rules = f'root ::= sum\nsum ::= term ("+" term){{{size},{size + 2}}}\nterm ::= [0-9]{{3}} | "(" [a-z]{{4}} ")"'
    term = r"([0-9]{3}|\([a-z]{4}\))"
    return Case({"grammar": rules}, re.compile(rf"{term}(\+{term}){{{size},{size + 2}}}").fullmatch)


def choice(count: int) -> Case:
    words = ["-".join(f"{n * 7919 % 99991:05d}" for n in range(k + 1, k + 61)) for k in range(count)]
    return Case({"choice": words}, words.__contains__)


def _string(length: int) -> dict[str, Any]:
    return {"type": "string", "pattern": f"^[a-z]{{{length},{length + 3}}}$"}


def cases(of_each: int) -> dict[str, Case]:
    """Texts are long enough for all moves, also where other programs take the processor."""
    found: dict[str, Case] = {}
    for n in range(of_each):
        colours = {"type": "array", "minItems": 60 + n, "maxItems": 62 + n, "items": {"enum": ["red", "green", "blue"]}}
        found |= {
            f"json-{n}": schema({"name": _string(6 + n), "tags": colours, "ok": {"type": "boolean"}}),
            f"tools-{n}": tools(n + 1),
            f"regex-{n}": regex(rf"([a-z]{{3,{4 + n}}}-[0-9]{{2}};){{{40 + n},{41 + n}}}end"),
            f"grammar-{n}": grammar(55 + n),
            f"choice-{n}": choice(2 + n),
        }
    return found


@pytest.fixture(scope="module")
def pair(runner: asyncio.Runner, tiny_llama: str, etcd_url: str, request: pytest.FixtureRequest) -> Iterator[Pair]:
    # Weights that are random know no end of white space.
    backend = getattr(request, "param", "xgrammar")
    guided = {"backend": backend, "disable_any_whitespace": backend != "outlines"}
    pair = runner.run(start_pair(tiny_llama, etcd_url, dtype="float32", structured_outputs_config=guided))
    yield pair
    runner.run(pair.stop())


@functools.cache
def tokenizer(model: str) -> Any:
    return AutoTokenizer.from_pretrained(model)


def asked(name: str, case: Case, number: int, tokens: int = 1500) -> GenerateRequest:
    how: dict[str, Any] = {"temperature": 0.0} if number % 2 else {"temperature": 1.0, "seed": number}
    request = request_of(name, 20 + number, Sampling(max_tokens=tokens, **how))
    return native_of(request, 2048, structured_outputs=StructuredOutputsParams(**case.guided))


async def moved(pair: Pair, request: GenerateRequest) -> Client:
    """Its answer, which is long enough for all moves: each takes some steps of its source."""
    client, source, target = Client(), pair.a, pair.b
    stream: Any = source.generate(request)
    for n in range(MOVES):
        await take_until(stream, client, 4 * n + 1)
        stream = await move(source, target, request, client, stream, live=True)
        source, target = target, source
    async for output in stream:
        client.take(output)
    return client


async def check(pair: Pair, model: str, found: dict[str, Case]) -> None:
    for number, (name, case) in enumerate(found.items()):
        request = asked(name, case, number)
        for engine in (pair.a, pair.b):
            # Some backends take seconds for a grammar that an engine has not seen; the source goes on meanwhile.
            await run(engine, msgspec.structs.replace(asked(name, case, number, 1), prompt_token_ids=(5, 6, 7)))
        client = await moved(pair, request)
        plain = await run(pair.b, msgspec.structs.replace(request, request_id=RequestId(f"plain-{name}")))
        text = tokenizer(model).decode(client.tokens, skip_special_tokens=True)
        assert client.tokens == plain.tokens, name
        assert client.finish is plain.finish is FinishReason.STOP, (name, text)
        assert case.valid(text), (name, text)
    for engine in (pair.a, pair.b):
        await empty(engine)


def test_guided_requests_stay_valid_and_equal(runner: asyncio.Runner, pair: Pair, tiny_llama: str) -> None:
    runner.run(asyncio.wait_for(check(pair, tiny_llama, cases(2)), 300))


def test_a_guided_request_that_is_computed_again_goes_on_in_its_grammar(
    runner: asyncio.Runner, pair: Pair, tiny_llama: str
) -> None:
    """As when the worker that it went to is lost."""

    async def scenario() -> None:
        request = asked("again", schema({"name": _string(20), "more": _string(20)}), 1)
        plain = await run(pair.a, request)
        made = tuple(plain.tokens[: len(plain.tokens) // 2])
        again = msgspec.structs.replace(request, request_id=RequestId("again-2"), output_token_ids=made)
        client = Client(list(made))
        async for output in pair.b.generate(again):
            client.take(output)
        assert client.tokens == plain.tokens and client.finish is FinishReason.STOP

    runner.run(asyncio.wait_for(scenario(), 60))


def test_tokens_that_the_grammar_refuses_end_the_request(runner: asyncio.Runner, pair: Pair) -> None:
    async def scenario() -> None:
        request = asked("wrong", regex("[0-9]{30}"), 1)
        wrong = msgspec.structs.replace(request, output_token_ids=(100, 101, 102))
        outputs = [output async for output in pair.b.generate(wrong)]
        assert [output.finish_reason for output in outputs] == [FinishReason.ERROR]
        assert not any(output.token_ids for output in outputs)

    runner.run(asyncio.wait_for(scenario(), 60))


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["xgrammar", "guidance", "outlines"], indirect=True)
def test_fifty_guided_requests_stay_valid_and_equal(
    runner: asyncio.Runner, pair: Pair, tiny_llama: str, request: pytest.FixtureRequest
) -> None:
    found = cases(10)
    if request.node.callspec.params["pair"] == "outlines":
        found = {name: case for name, case in found.items() if "grammar" not in case.guided}
    runner.run(asyncio.wait_for(check(pair, tiny_llama, found), 1500))
