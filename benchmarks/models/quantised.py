# SPDX-License-Identifier: Apache-2.0
"""Quantised models with random weights, as ``components/models/tiny.py`` makes others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.models.families import LARGE
from components.models.tiny import sizes

_EACH = {"num_bits": 8, "symmetric": True}
_CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": _EACH | {"type": "int", "strategy": "channel", "dynamic": False},
            "input_activations": _EACH | {"type": "int", "strategy": "token", "dynamic": True},
        }
    },
    "kv_cache_scheme": _EACH | {"type": "float", "strategy": "tensor", "dynamic": False},
}


def _int8(tokenizer: Any, target: Path) -> None:
    """As llm-compressor writes it (W8A8): int8 weights with a scale for each channel, and scales of an FP8 KV cache."""
    import torch
    import transformers
    from safetensors.torch import save_file

    config = transformers.LlamaConfig(**(sizes(tokenizer) | LARGE | {"tie_word_embeddings": False}))
    torch.manual_seed(0)
    made: Any = transformers.LlamaForCausalLM
    state = dict(made(config).to(torch.bfloat16).state_dict())
    for name in [name for name in state if name.endswith("_proj.weight")]:
        weights = state[name].float()
        scale = (weights.abs().amax(dim=1, keepdim=True) / 127).to(torch.bfloat16)
        state[name + "_scale"] = scale
        state[name] = (weights / scale.float()).round().clamp(-127, 127).to(torch.int8)
    for layer in range(config.num_hidden_layers):
        for number, kind in enumerate(("k_scale", "v_scale")):
            state[f"model.layers.{layer}.self_attn.{kind}"] = torch.tensor([0.01 * (1 + layer + number / 2)])
    config.update({"architectures": ["LlamaForCausalLM"], "quantization_config": _CONFIG, "dtype": "bfloat16"})
    config.save_pretrained(target)
    save_file({name: value.contiguous() for name, value in state.items()}, target / "model.safetensors")
    tokenizer.save_pretrained(target)


QUANTISED: dict[str, Callable[[Any, Path], None]] = {"tiny-llama-int8": _int8}
