# SPDX-License-Identifier: Apache-2.0
"""A small model with random weights for each kind of KV cache, as ``components/models/tiny.py`` makes others."""

from __future__ import annotations

from typing import Any

_WINDOW = 64
LARGE = {"initializer_range": 0.2, "pad_token_id": 0}
MLA = {
    # As DeepSeek's: FlashAttention 3 takes few pairs of unequal sizes for keys and values.
    "kv_lora_rank": 512,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
DEEPSEEK = {
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
    # Five sliding layers for each full one.
    "tiny-gemma3": (
        ("Gemma3Text", "Gemma3ForCausalLM"),
        LARGE
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
        LARGE
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
        LARGE | MLA | DEEPSEEK,
    ),
    # Gated delta nets and full attention.
    "tiny-qwen3-next": (
        ("Qwen3Next", "Qwen3NextForCausalLM"),
        LARGE
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
    # Selective states (Mamba), one layer of full attention, and experts. On GPUs alone: vLLM has no kernels for CPUs.
    "tiny-jamba": (
        ("Jamba", "JambaForCausalLM"),
        LARGE
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "attn_layer_period": 4,
            "attn_layer_offset": 2,
            "mamba_d_state": 16,
            "mamba_dt_rank": 8,
            "num_attention_heads": 2,
            "use_mamba_kernels": False,
        },
    ),
}
