# SPDX-License-Identifier: Apache-2.0
"""What the frontend gets for outputs of more than one token, which a busy engine joins."""

from __future__ import annotations

from typing import Any

import pytest

from components.engine.protocol import FinishReason, GenerateOutput, TokenLogprob
from components.router.openai import Responder, has_stop_strings

JOINED = GenerateOutput(
    0,
    token_ids=(5, 6, 7),
    logprobs=tuple(TokenLogprob(-float(token)) for token in (5, 6, 7)),
    finish_reason=FinishReason.LENGTH,
    cached_tokens=2,
)


class Tokenizer:
    """Names tokens by their numbers."""

    def decode(self, token_ids: list[int]) -> str:
        return " ".join(map(str, token_ids))


def chunks(one_by_one: bool) -> list[dict[str, Any]]:
    return list(Responder(Tokenizer(), 4, wants_logprobs=True, one_by_one=one_by_one).chunks(JOINED))


def test_a_response_that_a_text_may_end_comes_token_by_token() -> None:
    each = chunks(one_by_one=True)
    assert [(c["token_ids"], c["log_probs"]) for c in each] == [([5], [-5.0]), ([6], [-6.0]), ([7], [-7.0])]
    assert [c.get("finish_reason") for c in each] == [None, None, "length"]
    [joined] = chunks(one_by_one=False)
    assert (joined["token_ids"], joined["log_probs"]) == ([5, 6, 7], [-5.0, -6.0, -7.0])
    assert each[-1]["completion_usage"] == joined["completion_usage"]
    assert joined["completion_usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("payload", "expected"),
    [({}, False), ({"stop_conditions": None}, False), ({"stop_conditions": {"stop": ["."]}}, True)],
)
def test_who_may_be_ended_by_a_text(payload: dict[str, Any], expected: bool) -> None:
    assert has_stop_strings(payload) is expected
