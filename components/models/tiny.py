# SPDX-License-Identifier: Apache-2.0
"""Models of a few layers with random weights, one for each kind of KV cache.

Weights are equal on every machine (torch's seeded generator), and large enough for every layer's KV to affect the
next token: with transformers' small initial weights a model would hardly use its KV.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

_WINDOW = 64
DRAFTER = "tiny-llama-eagle"
"""Drafts for ``tiny-llama``."""
QUANTISED = "tiny-llama-int8"
"""Weights of 8 bits, and a calibrated scale of each layer for an FP8 KV cache."""


def make(name: str, tokenizer: Any, target: Path) -> None:
    """Write the model and its tokenizer into a folder."""
    import torch
    import transformers

    if name in _OTHERS:
        _OTHERS[name](tokenizer, target)
        return
    architecture, fields = FAMILIES[name]
    config = getattr(transformers, f"{architecture[0]}Config")(**(sizes(tokenizer) | fields))
    torch.manual_seed(0)
    model = getattr(transformers, architecture[1])(config).to(torch.bfloat16)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _make_drafter(tokenizer: Any, target: Path) -> None:
    """An EAGLE drafter of ``tiny-llama``: one layer on the token's embedding, with the weights of the model's first.

    The hidden state of the token before, which EAGLE adds, is left out. Some of the drafts are accepted.
    """
    import torch
    import transformers
    from safetensors.torch import save_file

    config = transformers.LlamaConfig(**sizes(tokenizer))
    torch.manual_seed(0)
    made: Any = transformers.LlamaForCausalLM
    model = made(config).to(torch.bfloat16)
    layer = {name: value for name, value in model.model.state_dict().items() if name.startswith("layers.0.")}
    del layer["layers.0.input_layernorm.weight"]
    size = config.hidden_size
    state = layer | {"fc.weight": torch.eye(size, 2 * size, dtype=torch.bfloat16)}
    config.num_hidden_layers, config.architectures = 1, ["LlamaForCausalLM"]
    config.save_pretrained(target)
    save_file({name: value.contiguous() for name, value in state.items()}, target / "model.safetensors")
    tokenizer.save_pretrained(target)


def _make_quantised(tokenizer: Any, target: Path) -> None:
    """As llm-compressor writes it (compressed-tensors, W8A8): int8 weights with a scale for each channel."""
    import torch
    import transformers
    from safetensors.torch import save_file

    config = transformers.LlamaConfig(**(sizes(tokenizer) | _LARGE | {"tie_word_embeddings": False}))
    torch.manual_seed(0)
    made: Any = transformers.LlamaForCausalLM
    state = dict(made(config).to(torch.bfloat16).state_dict())
    for name in [name for name in state if name.endswith("_proj.weight")]:
        scale = state[name].float().abs().amax(dim=1, keepdim=True) / 127
        state[name + "_scale"] = scale.to(torch.bfloat16)
        state[name] = (state[name].float() / state[name + "_scale"].float()).round().clamp(-127, 127).to(torch.int8)
    for layer in range(config.num_hidden_layers):
        for number, kind in enumerate(("k_scale", "v_scale")):
            state[f"model.layers.{layer}.self_attn.{kind}"] = torch.tensor([0.01 * (1 + layer + number / 2)])
    each = {"num_bits": 8, "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": each | {"type": "int", "strategy": "channel", "dynamic": False},
        "input_activations": each | {"type": "int", "strategy": "token", "dynamic": True},
    }
    quantised = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
        "kv_cache_scheme": each | {"type": "float", "strategy": "tensor", "dynamic": False},
    }
    config.update({"architectures": ["LlamaForCausalLM"], "quantization_config": quantised, "dtype": "bfloat16"})
    config.save_pretrained(target)
    save_file({name: value.contiguous() for name, value in state.items()}, target / "model.safetensors")
    tokenizer.save_pretrained(target)


_OTHERS = {DRAFTER: _make_drafter, QUANTISED: _make_quantised}


def sizes(tokenizer: Any) -> dict[str, Any]:
    """What all of them have."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 8192,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


_LARGE = {"initializer_range": 0.2, "pad_token_id": 0}
_MLA = {
    "kv_lora_rank": 512,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
_DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "n_group": 2,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "first_k_dense_replace": 1,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

FAMILIES: dict[str, tuple[tuple[str, str], dict[str, Any]]] = {
    "tiny-llama": (("Llama", "LlamaForCausalLM"), {}),
    "tiny-mixtral": (("Mixtral", "MixtralForCausalLM"), {"num_local_experts": 4, "num_experts_per_tok": 2}),
    # Five sliding layers for each full one.
    "tiny-gemma3": (
        ("Gemma3Text", "Gemma3ForCausalLM"),
        _LARGE
        | {
            "num_hidden_layers": 6,
            "tie_word_embeddings": False,
            "sliding_window": _WINDOW,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        },
    ),
    # Alternating sliding and full layers, with sinks and experts.
    "tiny-gpt-oss": (
        ("GptOss", "GptOssForCausalLM"),
        _LARGE
        | {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": _WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    # One compressed head (MLA).
    "tiny-deepseek-v3": (
        ("DeepseekV3", "DeepseekV3ForCausalLM"),
        _LARGE | _MLA | _DEEPSEEK,
    ),
    # Gated delta nets and full attention.
    "tiny-qwen3-next": (
        ("Qwen3Next", "Qwen3NextForCausalLM"),
        _LARGE
        | _EXPERTS
        | {
            "shared_expert_intermediate_size": 64,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        },
    ),
}
