# SPDX-License-Identifier: Apache-2.0
"""Weights of a model: completeness, and their part in an engine's fingerprint."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.config import WatermarkConfig
from vllm.model_executor.layers.attention.attention import set_default_quant_scales

from components.engine.vllm.fingerprint import fingerprint, weights_of
from components.errors import ConfigError
from components.models.weights import check, digest
from components.transfer import KVPool

_LENGTH = (2).to_bytes(8, "little")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Twenty layers of three tensors, in two files."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for number, name in enumerate(SHARDS):
        layers = range(10 * number, 10 * number + 10)
        kinds = {"q": (64, 64), "up": (64, 512), "norm": (64,)}
        save_file({f"layers.{n}.{k}": torch.randn(size) for n in layers for k, size in kinds.items()}, folder / name)
    index = ",".join(f'"{number}": "{name}"' for number, name in enumerate(SHARDS))
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{index}}}}}')
    return folder


LONG_ROPE = {"rope_type": "longrope", "original_max_position_embeddings": 4096}


@dataclass
class _Spec:
    """A kind of cache."""

    num_kv_heads: int


def engine(model: Path | str, load_format: str = "auto", runner: str = "v1", adapters: str = "", **more: Any) -> str:
    """The fingerprint of an engine, as far as it reads vLLM's configuration."""
    config = SimpleNamespace(to_dict=lambda: {"_name_or_path": str(model), "hidden_size": 64})
    values: dict[str, Any] = {
        "hf_config": config,
        "model": str(model),
        "model_weights": "",
        "revision": None,
        "dtype": torch.bfloat16,
        "quantization": None,
        "quantization_config": None,
        "cache_dtype": "auto",
        "logits_processors": None,
        "drafts": None,
        "ranks": 1,
        "heads": 0,
        "spread": (1, 1),
        "hf_text_config": SimpleNamespace(rope_parameters=LONG_ROPE),
        "hf_config_path": None,
        "max_model_len": 4096,
        "generation_config": "auto",
        "override_generation_config": {},
        "logprobs_mode": "raw_logprobs",
        "use_fp64_gumbel": False,
        "tokenizer": str(model),
        "tokenizer_revision": None,
        "tokenizer_mode": "auto",
        "multimodal_config": None,
    } | more
    layer: Any = torch.nn.Module()
    layer.attn_backend = SimpleNamespace(get_name=lambda: values.get("backend", "CPU_ATTN"))
    layer.isa = values.get("isa", "vec")
    set_default_quant_scales(layer, register_buffer=True)
    for name, scale in values.get("scales", {}).items():
        assert hasattr(layer, name)
        setattr(layer, name, scale)
    vllm_config: Any = SimpleNamespace(
        model_config=SimpleNamespace(**values),
        load_config=SimpleNamespace(load_format=load_format, download_dir=None),
        cache_config=SimpleNamespace(cache_dtype=values["cache_dtype"], block_size=16),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=values["ranks"],
            decode_context_parallel_size=values["spread"][0],
            prefill_context_parallel_size=1,
            cp_kv_cache_interleave_size=values["spread"][1],
        ),
        speculative_config=values["drafts"],
        watermark_config=values.get("watermark"),
        compilation_config=SimpleNamespace(static_forward_context={"layer.0": layer}),
    )
    order = values.get("order", (0, 1, 2))
    pools = [KVPool("layer.0", torch.zeros(4, 8, 16).permute(order), 4, 0)]
    if heads := values["heads"]:
        pools = [KVPool("layer.0", torch.zeros(4, max(1, heads // values["ranks"]), 8, 16), 4, 0, heads, 1)]
    spec = _Spec(max(1, values["heads"] // values["ranks"]))
    groups = [SimpleNamespace(kv_cache_spec=spec, layer_names=["layer.0"])]
    plan: Any = SimpleNamespace(kv_cache_groups=groups, kv_cache_layout="LBNHC")
    return fingerprint(vllm_config, plan, pools, runner, adapters, weights_of(vllm_config))


def test_equal_copies_in_other_folders_have_one_fingerprint(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "copy")
    assert engine(model) == engine(tmp_path / "copy")


@pytest.mark.parametrize("kind", ["q", "up", "norm"])
def test_a_fine_tune_with_the_same_configuration_has_another_fingerprint(model: Path, kind: str) -> None:
    before = engine(model)
    tensors = load_file(model / SHARDS[1])
    save_file({n: t + 0.01 if n.endswith(kind) else t for n, t in tensors.items()}, model / SHARDS[1])
    assert engine(model) != before


def quantised(how: dict[str, Any]) -> Any:
    return SimpleNamespace(to_dict=lambda: {"hidden_size": 64, "quantization_config": how})


def drafts(method: str = "ngram", drafter: Any = None) -> Any:
    return SimpleNamespace(
        method=method,
        num_speculative_tokens=3,
        rejection_sample_method="standard",
        draft_model_config=drafter,
        draft_load_config=None,
    )


def test_whatever_changes_a_token_changes_the_fingerprint(model: Path, tmp_path: Path) -> None:
    eagle = SimpleNamespace(model=str(tmp_path / "drafter"), model_weights="", revision=None)
    same = engine(model)
    changes: list[dict[str, Any]] = [
        {"runner": "v2"},
        {"dtype": torch.float16},
        {"cache_dtype": "fp8"},
        {"quantization": "awq"},
        {"quantization": "gptq", "hf_config": quantised({"quant_method": "gptq", "bits": 4})},
        {"quantization": "gptq", "hf_config": quantised({"quant_method": "gptq", "bits": 8})},
        {"quantization": "fp8"},
        {"quantization": "online", "quantization_config": {"linear": "fp8_per_block"}},
        {"quantization": "online", "quantization_config": {"linear": "fp8_per_tensor"}},
        {"scales": {"_k_scale": torch.tensor(0.5)}},
        {"scales": {"_v_scale": torch.tensor(0.5)}},
        {"scales": {"_v_scale": torch.tensor([1.0, 0.5])}},
        {"adapters": "another"},
        {"load_format": "dummy"},
        {"order": (0, 2, 1)},
        {"logits_processors": ["package.module.Processor"]},
        {"drafts": drafts()},
        {"drafts": drafts("eagle")},
        {"drafts": drafts("eagle", eagle)},
        {"spread": (2, 1)},
        {"spread": (4, 1)},
        {"spread": (2, 16)},
        {"isa": "amx"},
        {"backend": "TRITON_ATTN"},
        {"max_model_len": 8192},
        {"generation_config": "vllm"},
        {"override_generation_config": {"temperature": 0.5}},
        {"logprobs_mode": "processed_logprobs"},
        {"use_fp64_gumbel": True},
        {"watermark": WatermarkConfig(key=1)},
        {"watermark": WatermarkConfig(key=2)},
        {"tokenizer_mode": "slow"},
        {"multimodal_config": SimpleNamespace(mm_processor_kwargs={"max_pixels": 1000})},
    ]
    assert len({same, *(engine(model, **change) for change in changes)}) == 1 + len(changes)


def test_the_tokenizer_and_the_ends_of_answers_are_part_of_the_fingerprint_and_chat_templates_are_not(
    model: Path,
) -> None:
    def after(name: str, content: str) -> str:
        (model / name).write_text(content)
        return engine(model)

    seen = [engine(model), after("generation_config.json", '{"eos_token_id": 2}')]
    seen += [after("generation_config.json", '{"eos_token_id": [2, 3]}'), after("tokenizer.json", "{}")]
    seen += [after("tokenizer_config.json", '{"eos_token": "</s>"}')]
    assert len(set(seen)) == len(seen)
    assert after("tokenizer_config.json", '{"chat_template": "{{ x }}", "eos_token": "</s>"}') == seen[-1]
    assert after("generation_config.json", '{"transformers_version": "9", "eos_token_id": [2, 3]}') == seen[-1]


def test_each_scale_of_a_quantised_kv_cache_is_part_of_a_models_identity(tmp_path: Path) -> None:
    """A calibration changes nothing else, and of a large model only some tensors are read."""
    layers = {f"layers.{n}.mlp.{k}.weight": torch.zeros(1) for n in range(400) for k in ("up", "down")}
    scales = {f"layers.{n}.self_attn.{kind}": torch.ones(1) for n in range(40) for kind in ("k_scale", "v_scale")}
    save_file(layers | scales, tmp_path / "model.safetensors")
    before = digest(str(tmp_path), "auto")
    save_file(layers | scales | {"layers.7.self_attn.v_scale": torch.tensor([0.5])}, tmp_path / "model.safetensors")
    assert digest(str(tmp_path), "auto") != before


def test_engines_of_all_tensor_parallel_sizes_have_one_fingerprint_where_blocks_divide(model: Path) -> None:
    def of(ranks: int, heads: int = 4, load: str = "auto") -> str:
        return engine(model, load, ranks=ranks, heads=heads)

    assert of(1) == of(2) == of(8) != of(1, heads=8)
    # A state does not divide; random weights of two ranks are not those of one.
    assert of(1, heads=0) != of(2, heads=0)
    assert of(1, load="dummy") != of(2, load="dummy")


def test_random_weights_are_those_of_every_folder(model: Path, tmp_path: Path) -> None:
    assert engine(model, "dummy") == engine(tmp_path / "elsewhere", "dummy")


def test_a_name_without_files_here_stands_for_itself_and_its_revision() -> None:
    assert digest("some/model", "auto") == digest("some/model", "auto")
    assert len({digest("some/model", "auto", r) for r in (None, "a", "b")} | {digest("some/other", "auto")}) == 4
    assert digest("s3://bucket/model", "runai_streamer") != digest("s3://bucket/other", "runai_streamer")


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, _LENGTH + b"[]" + bytes(20), _LENGTH + b"{}"])
def test_any_file_has_a_digest(model: Path, content: bytes) -> None:
    before = digest(str(model), "auto")
    (model / SHARDS[0]).write_bytes(content)
    assert digest(str(model), "auto") != before


def test_files_of_the_format_that_is_read_make_the_digest(model: Path) -> None:
    before = {kind: digest(str(model), kind) for kind in ("auto", "pt")}
    (model / "extra.bin").write_bytes(b"1")
    after = {kind: digest(str(model), kind) for kind in ("auto", "pt")}
    assert after["auto"] == before["auto"] and after["pt"] != before["pt"]
    for name in SHARDS:
        (model / name).rename(model / name.replace("model", "consolidated"))
    assert digest(str(model), "mistral") != digest(str(model), "pt") == after["pt"]


def test_a_half_written_model_is_refused(model: Path) -> None:
    check(str(model), "auto")
    whole = (model / SHARDS[0]).read_bytes()
    (model / SHARDS[0]).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="00001-of-00002.safetensors is missing or not whole.*copy it again"):
        check(str(model), "auto")
    (model / SHARDS[0]).unlink()
    with pytest.raises(ConfigError, match="00001-of-00002.safetensors is missing or not whole"):
        check(str(model), "auto")
    (model / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ConfigError, match="index.json is missing or not whole"):
        check(str(model), "auto")


def test_mistrals_own_files_need_no_index(model: Path) -> None:
    for name in SHARDS:
        (model / name).rename(model / name.replace("model", "consolidated"))
    check(str(model), "auto")
    check(str(model), "mistral")


@pytest.mark.parametrize("load_format", ["dummy", "tensorizer", "runai_streamer", "some_plugin"])
def test_formats_that_read_no_file_of_the_folder_need_none(tmp_path: Path, load_format: str) -> None:
    check(str(tmp_path), load_format)
    with pytest.raises(ConfigError, match="has no weights"):
        check(str(tmp_path), "auto")
