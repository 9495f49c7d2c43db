# SPDX-License-Identifier: Apache-2.0
"""Guided requests that come with tokens: the grammar allows the same next tokens as without a move.

Real vLLM schedulers and real grammars of all backends; steps are played.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from components.engine.kv import Frozen, RequestId
from components.engine.vllm.control import Marker, Op, Reply
from components.errors import SessionError
from tests.vllm_scheduler import Played, offer_of

pytest.importorskip("vllm")
from transformers import AutoTokenizer
from vllm.sampling_params import StructuredOutputsParams

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "tags": {"type": "array", "items": {"enum": ["red", "green"]}}},
    "required": ["name", "tags"],
    "additionalProperties": False,
}
ARITHMETIC = 'root ::= term ("+" term)*\nterm ::= [0-9]+ | "(" root ")"'
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "json": ({"json": SCHEMA}, '{"name":"a","tags":["re'),
    "regex": ({"regex": r"(ab|cd){3,9}e"}, "abcdab"),
    "ebnf": ({"grammar": ARITHMETIC}, "12+(3+4"),
    "choice": ({"choice": ["abracadabra-red", "abracadabra-green"]}, "abracadabra-"),
}
PROMPT = list(range(1, 41))


def guided(kind: str, backend: str) -> tuple[StructuredOutputsParams, str]:
    fields, text = KINDS[kind]
    if kind == "choice" and backend != "outlines":
        # vLLM's own rewriting of a choice for these two.
        fields = {"grammar": 'root ::= "abracadabra-red" | "abracadabra-green"'}
    params = StructuredOutputsParams(**fields)
    params._backend = backend
    return params, text


def tokens_of(model: str, text: str) -> list[int]:
    return list(AutoTokenizer.from_pretrained(model).encode(text, add_special_tokens=False))


def add(played: Played, params: StructuredOutputsParams, made: list[int], offered: bool = True) -> Any:
    """A request that another engine has given ``made``."""
    known = len(PROMPT) + len(made) - 1
    offer = offer_of("moved", known // 16 * 16) if offered else None
    marker = Marker(RequestId("moved"), len(PROMPT), landing=offer)
    return played.add([*PROMPT, *made], marker, "moved", structured_outputs=params)


def landed(played: Played, request: Any) -> bool:
    """Play a step, and ask."""
    output = played.schedule()
    assert not output.num_scheduled_tokens
    played.finish_step(output, played.done(*played.jobs(output)))
    reply = played.call(Op.LANDING, request)
    assert isinstance(reply, Reply) and reply.landing is not None
    return not reply.landing.in_flight


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def commit(played: Played, request: Any, tokens: list[int], guide: str = "") -> None:
    frozen = Frozen(offer_of("moved", len(PROMPT) + len(tokens) - 1), tuple(tokens), guide=guide)
    played.call(Op.COMMIT, request, frozen=frozen)


def next_mask(played: Played, request: Any) -> list[int]:
    """What the sampler is told of the request's next token."""
    for _ in range(10):
        output = played.schedule()
        if output.num_scheduled_tokens:
            break
        played.finish_step(output, played.done(*played.jobs(output)))
    assert list(output.num_scheduled_tokens) == [request.request_id]
    found = played.scheduler.get_grammar_bitmask(output)
    assert found is not None and found.structured_output_request_ids == [request.request_id]
    return list(found.grammar_bitmask[0])


def undisturbed(played: Played, params: StructuredOutputsParams, made: list[int]) -> list[int]:
    """What a request of the same prompt that made these tokens here is told."""
    manager = played.scheduler.structured_output_manager
    request = played.add(PROMPT, None, structured_outputs=params)
    until(lambda: bool(request.structured_output_request.is_grammar_ready))
    for token in made:
        request.append_output_token_ids([token])
        assert manager.accept_tokens(request, [token])
    mask = manager.grammar_bitmask({request.request_id: request}, [request.request_id], {}).copy()
    played.scheduler.finish_requests(request.request_id, request.status.FINISHED_ABORTED)
    return list(mask[0])


@pytest.mark.parametrize("backend", ["xgrammar", "guidance", "outlines"])
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("offered", [True, False], ids=["moved", "recomputed"])
def test_the_grammar_goes_on_where_it_was(tiny_llama: str, kind: str, backend: str, offered: bool) -> None:
    if kind == "ebnf" and backend == "outlines":
        pytest.skip("outlines has no grammars")
    played = Played(tiny_llama)
    params, text = guided(kind, backend)
    made = tokens_of(tiny_llama, text)
    assert len(made) > 1
    request = add(played, params, made[:-1], offered)
    if offered:
        until(lambda: landed(played, request))
        # The last token came between reservation and commit.
        commit(played, request, made)
    else:
        request.append_output_token_ids(made[-1])
        until(lambda: bool(request.structured_output_request.is_grammar_ready))
    mask = next_mask(played, request)
    assert mask == undisturbed(played, params, made)
    assert mask != undisturbed(played, params, []), "the grammar has begun again"


class Thinks:
    """A reasoning parser: the grammar begins behind token 7; tokens 7 after that are text."""

    def __init__(self, tokenizer: Any, **_: Any) -> None: ...

    def is_reasoning_end(self, input_ids: list[int]) -> bool:
        return 7 in input_ids[-2:]

    def is_reasoning_end_streaming(self, input_ids: list[int], delta_ids: list[int]) -> bool:
        # As parsers that look at no more than the end of what has come so far.
        return self.is_reasoning_end(input_ids)


@pytest.mark.parametrize("text", ["", "abcd"], ids=["still thinking", "behind the thoughts"])
def test_thoughts_in_front_of_the_grammar_are_no_part_of_it(tiny_llama: str, text: str) -> None:
    played = Played(tiny_llama)
    played.scheduler.structured_output_manager.reasoner_cls = Thinks
    params, _ = guided("regex", "xgrammar")
    made = [100, 101, 102, *([7, *tokens_of(tiny_llama, text)] if text else [])]
    request = add(played, params, made[:2])
    until(lambda: landed(played, request))
    commit(played, request, made)
    assert request.structured_output_request.reasoning_ended is bool(text)
    assert next_mask(played, request) == undisturbed(played, params, made)


def test_the_source_goes_on_while_the_grammar_is_compiled(tiny_llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    played = Played(tiny_llama)
    manager, compiled = played.scheduler.structured_output_manager, threading.Event()
    create = manager._create_grammar
    monkeypatch.setattr(manager, "_create_grammar", lambda request: compiled.wait(60) and create(request))
    params, text = guided("regex", "xgrammar")
    made = tokens_of(tiny_llama, text)
    request = add(played, params, made)
    assert not any(landed(played, request) for _ in range(3))
    with pytest.raises(SessionError, match="still being compiled"):
        commit(played, request, made)
    compiled.set()
    until(lambda: landed(played, request))
    commit(played, request, made)
    assert next_mask(played, request) == undisturbed(played, params, made)


def test_a_grammar_that_refuses_the_tokens_is_an_error_and_never_begins_again(tiny_llama: str) -> None:
    played = Played(tiny_llama)
    params, _ = guided("regex", "xgrammar")
    made = tokens_of(tiny_llama, "xyz")
    request = add(played, params, made)

    def failed() -> bool:
        try:
            return landed(played, request) and False
        except SessionError as error:
            return "refuses" in str(error)

    until(failed)
    with pytest.raises(SessionError, match="refuses"):
        commit(played, request, made)
    played.scheduler.finish_requests(request.request_id, request.status.FINISHED_ABORTED)
    # Without a source that has it, it ends.
    alone = add(played, params, made, offered=False)
    until(lambda: bool(alone.structured_output_request.is_grammar_ready))
    output = played.schedule()
    assert not output.num_scheduled_tokens
    sent = played.finish_step(output)[alone.client_index].outputs
    assert str(sent[0].finish_reason) == "error" and not sent[0].new_token_ids
    played.check()


def test_another_guide_is_refused_before_anything_runs(tiny_llama: str) -> None:
    played = Played(tiny_llama)
    params, text = guided("regex", "guidance")
    made = tokens_of(tiny_llama, text)
    request = add(played, params, made)
    until(lambda: landed(played, request))
    with pytest.raises(SessionError, match="XgrammarGrammar guides the request at the source, GuidanceGrammar"):
        commit(played, request, made, "XgrammarGrammar")
    assert not played.step().num_scheduled_tokens


def test_a_frozen_request_says_what_guides_it(tiny_llama: str) -> None:
    played = Played(tiny_llama)
    params, _ = guided("regex", "xgrammar")
    request = played.add(PROMPT, structured_outputs=params)
    until(lambda: bool(request.structured_output_request.is_grammar_ready))
    played.token = tokens_of(tiny_llama, "ab")[0]
    played.step()
    answer = played.call(Op.FREEZE, request)
    assert isinstance(answer, Reply) and answer.frozen is not None and answer.frozen.guide == "XgrammarGrammar"
