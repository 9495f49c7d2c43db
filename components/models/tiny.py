# SPDX-License-Identifier: Apache-2.0
"""Models of a few layers with random weights.

Weights are equal on every machine (torch's seeded generator), and large enough for every layer's KV to affect the
next token: with transformers' small initial weights a model would hardly use its KV.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def make(name: str, tokenizer: Any, target: Path) -> None:
    """Write one of ``FAMILIES`` and its tokenizer into a folder."""
    write(*FAMILIES[name], tokenizer, target)


def write(architecture: tuple[str, str], fields: dict[str, Any], tokenizer: Any, target: Path) -> None:
    """Write a model: (names of its configuration and class in transformers), and fields beside ``sizes``."""
    import torch
    import transformers

    config = getattr(transformers, f"{architecture[0]}Config")(**(sizes(tokenizer) | fields))
    torch.manual_seed(0)
    model = getattr(transformers, architecture[1])(config).to(torch.bfloat16)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


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


FAMILIES: dict[str, tuple[tuple[str, str], dict[str, Any]]] = {
    "tiny-llama": (("Llama", "LlamaForCausalLM"), {}),
    "tiny-mixtral": (("Mixtral", "MixtralForCausalLM"), {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
