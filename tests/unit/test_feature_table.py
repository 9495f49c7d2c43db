# SPDX-License-Identifier: Apache-2.0
"""docs/features.md: its rows are tested, and every request field of the installed Dynamo and vLLM is in one of them."""

from __future__ import annotations

import importlib.util
import inspect
import mmap
import re
from pathlib import Path

import pytest
from vllm import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from benchmarks.migration import equal
from components.engine.vllm import native
from tests.integration.features import FEATURES
from tests.moved_fields import MOVED

ROOT = Path(__file__).parents[2]
TABLE = (ROOT / "docs" / "features.md").read_text().partition("| feature |")[2].partition("\n## ")[0]
ROWS = {
    cells[1].strip(): (re.findall(r"`(\w+)`", cells[2]), cells[3].strip())
    for line in TABLE.splitlines()[2:]
    if len(cells := line.split("|")) > 3
}
FIELDS = {field for fields, _ in ROWS.values() for field in fields}
# What Dynamo's frontend sends. The names are strings of its compiled library, which also tells how many there are.
SENT = """
PreprocessedRequest: model token_ids prompt_embeds multi_modal_data multi_modal_uuids mm_routing_info stop_conditions
    sampling_options output_options eos_token_ids mdc_sum annotations routing router_config_override prefill_result
    encoder_result migration_link bootstrap_info extra_args kv_hint require_reasoning router agent_context
    image_cache_scope mm_processor_kwargs media_io_kwargs request_timestamp_ms _HEALTH_CHECK
StopConditions: max_tokens stop stop_token_ids stop_token_ids_visible stop_token_ids_hidden min_tokens ignore_eos
    max_thinking_tokens
SamplingOptions: n best_of presence_penalty frequency_penalty repetition_penalty temperature top_p top_k min_p
    use_beam_search length_penalty seed include_stop_str_in_output guided_decoding
OutputOptions: logprobs prompt_logprobs skip_special_tokens formatted_prompt no_stop_trim return_tokens_as_token_ids
GuidedDecodingOptions: json regex choice grammar backend whitespace_pattern structural_tag
"""
STRUCTS = {name: sent.split() for name, sent in re.findall(r"^(\w+): (.*?)(?=^\w+:|\Z)", SENT, re.M | re.S)}


def test_every_row_is_tested_and_every_test_is_a_row() -> None:
    assert list(ROWS) == list(FEATURES)
    for name, feature in FEATURES.items():
        stays = {bool(asked.stays) for asked in feature.asked.values()}
        assert stays <= {ROWS[name][1].startswith("stays")}, name
        if not feature.asked:
            file, _, test = feature.test.partition("::")
            [found] = ROOT.glob(f"tests/*/{file}")
            assert f"def {test}(" in found.read_text(), feature.test


def test_every_field_is_in_a_row() -> None:
    sent = {field for fields in STRUCTS.values() for field in fields}
    assert sent | set(SamplingParams.__struct_fields__) == FIELDS
    assert sum(len(fields) for fields, _ in ROWS.values()) == len(FIELDS), "a field is in two rows"


def test_rows_say_what_the_code_does() -> None:
    said = {field: text for fields, text in ROWS.values() for field in fields}
    assert all(said[field].startswith("stays") for field in native.FIXED)
    assert all(said[field].startswith("moves") for field in MOVED)


@pytest.mark.parametrize("struct", list(STRUCTS))
def test_dynamos_frontend_sends_no_other_fields(struct: str) -> None:
    spec = importlib.util.find_spec("dynamo._core")
    assert spec is not None and spec.origin is not None
    with (
        Path(spec.origin).open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as library,
    ):
        counts = {int(count) for count in re.findall(rb"struct %s with (\d+) elements" % struct.encode(), library)}
        assert counts == {len(STRUCTS[struct])}, f"{struct} has other fields than in docs/features.md"
        for field in STRUCTS[struct]:
            assert library.find(field.encode()) >= 0, field


def test_every_argument_of_the_engine_travels_or_keeps_a_request() -> None:
    given = set(inspect.signature(AsyncLLM.generate).parameters) - {"self"}
    travel = {"lora_request" if name == "lora" else name for name in native.Native.__struct_fields__}
    travel |= {"prompt", "sampling_params", "request_id"}
    # Dynamo's handlers give these to no request: they hand over token ids.
    unused = {"prompt_text", "tokenization_kwargs"}
    assert given - travel == unused | {"data_parallel_rank", "kv_hints"}


def test_every_case_names_tests_that_exist() -> None:
    page = (ROOT / "docs" / "cases.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    assert len(named) > 25
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"


def test_what_families_move_is_what_was_measured() -> None:
    text = (ROOT / "docs" / "features.md").read_text()
    assert "\n".join(equal.lines()) in text, "python -m benchmarks.migration.equal prints the table of today's results"
