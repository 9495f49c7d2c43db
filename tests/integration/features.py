# SPDX-License-Identifier: Apache-2.0
"""The rows of docs/features.md: requests of each feature, and whether they move.

Answers are long enough for a move in the middle. The test fills in ``{...}`` in a body.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ITEMS = 80
BOOLEANS = {
    "type": "object",
    "properties": {"a": {"type": "array", "items": {"type": "boolean"}, "minItems": ITEMS, "maxItems": ITEMS}},
    "required": ["a"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "say", "parameters": BOOLEANS}}]
LETTERS = "[a-e]+"


@dataclass(frozen=True)
class Asked:
    """One request."""

    body: dict[str, Any]
    chat: bool = False
    stays: str = ""
    """Part of the reason why it does not move; empty: it moves."""
    fits: str = ""
    """Regular expression for the answer, also for one that ends at its length."""
    holds: str = ""
    """Text that must be in the answer."""
    alone: bool = False
    """It must not run beside others: see docs/features.md."""


@dataclass(frozen=True)
class Feature:
    """A row: its requests, each by a name of its own."""

    asked: dict[str, Asked] = field(default_factory=dict)
    test: str = ""
    """Its test, when it is not in ``test_features``."""


def _one(body: dict[str, Any], **more: Any) -> Feature:
    return Feature({"": Asked(body, **more)})


_SEEDED = {"temperature": 0.9, "seed": 7}

FEATURES: dict[str, Feature] = {
    "sampling": Feature(
        {
            "greedy": Asked({"temperature": 0}),
            "seeded": Asked(_SEEDED),
            "truncated": Asked({**_SEEDED, "top_p": 0.9, "top_k": 40, "min_p": 0.01}),
        }
    ),
    "penalties": _one({**_SEEDED, "presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.1}),
    "stop strings": _one({"temperature": 0, "ignore_eos": False, "stop": ["{late}"]}),
    "stop tokens, length": _one({**_SEEDED, "ignore_eos": False, "min_tokens": 400, "stop_token_ids": [5, 6, 7, 8]}),
    "log-probabilities": Feature(
        {
            "completion": Asked({**_SEEDED, "logprobs": 3}),
            "chat": Asked({**_SEEDED, "logprobs": True, "top_logprobs": 2}, chat=True),
        }
    ),
    "token ids that are allowed, banned": Feature(
        {
            "allowed": Asked({**_SEEDED, "allowed_token_ids": list(range(500, 600))}),
            "banned": Asked({**_SEEDED, "bad_words_token_ids": [[504], [600, 601]]}),
        }
    ),
    "token ids as prompt": _one({"temperature": 0, "prompt": [50 + (7 * n * n) % 991 for n in range(200)]}),
    "streams and usage": _one({"temperature": 0, "stream": True, "stream_options": {"include_usage": True}}),
    "cache salt": _one({"temperature": 0, "nvext": {"cache_salt": "one"}}),
    "priority": _one({"temperature": 0, "nvext": {"agent_hints": {"priority": 3}}}),
    "extra_args, engine data": _one({"temperature": 0, "nvext": {"extra_fields": ["engine_data"]}}),
    "worker chosen by the client": _one({"temperature": 0, "nvext": {"backend_instance_id": "{worker}"}}),
    # A graph of its own: on CPUs, answers beside requests with adapters were not the same twice, moved or not.
    "LoRA": Feature(test="test_lora.py::test_a_request_keeps_its_adapter_when_it_moves"),
    "n": _one({**_SEEDED, "n": 2}, stays="n > 1"),
    "thinking budget": _one(
        {"temperature": 0, "prompt": "The sea.\n<think>", "nvext": {"max_thinking_tokens": 30}},
        stays="thinking budget",
        holds="</think>",
    ),
    "prompt_logprobs": _one(
        {"temperature": 0, "prompt_logprobs": 1, "nvext": {"extra_fields": ["prompt_logprobs"]}},
        stays="prompt_logprobs",
    ),
    "logprob_token_ids": _one(
        {"temperature": 0, "logprobs": 2, "logprob_token_ids": [5, 6]}, stays="ranks", alone=True
    ),
    "logits processors": Feature(test="test_vllm_variants.py::test_a_logits_processor_goes_on_from_the_tokens"),
    "guided decoding": Feature(
        {
            "regex": Asked({"temperature": 0, "guided_regex": LETTERS}, chat=True, fits=LETTERS),
            "choice": Asked(
                {"temperature": 0, "guided_choice": ["red " * 150, "blue " * 150]},
                chat=True,
                fits="(red )*(r|re|red)?|(blue )*(b|bl|blu|blue)?",
            ),
            "grammar": Asked(
                {"temperature": 0, "guided_grammar": 'root ::= ("yes " | "no ")+'},
                chat=True,
                fits="(yes |no )+(y|ye|n)?",
            ),
            "json": Asked({"temperature": 0, "guided_json": BOOLEANS}, chat=True),
            "json_schema": Asked(
                {
                    "temperature": 0,
                    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": BOOLEANS}},
                },
                chat=True,
            ),
            "tool_choice required": Asked({"temperature": 0, "tools": TOOLS, "tool_choice": "required"}, chat=True),
            "tool_choice named": Asked(
                {"temperature": 0, "tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "say"}}},
                chat=True,
            ),
            "streamed": Asked({"temperature": 0, "guided_regex": LETTERS, "stream": True}, chat=True, fits=LETTERS),
        }
    ),
    "speculative decoding": Feature(test="test_vllm_variants.py::test_no_token_changes_with_drafts"),
    "images": Feature(test="test_images.py::test_questions_about_images_move"),
    "prompt embeddings": Feature(test="test_cases.py::test_embeddings_are_refused_as_by_stock_dynamo"),
    "vLLM's own options": Feature(
        test="test_vllm_handover.py::test_options_of_vllms_own_are_served_and_keep_a_request_where_it_is"
    ),
    "between frontend and worker": Feature(test="test_feature_table.py::test_every_field_is_in_a_row"),
}
"""By the name in the first column of docs/features.md."""
