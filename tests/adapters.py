# SPDX-License-Identifier: Apache-2.0
"""Random LoRA adapters for ``tiny-llama``, in PEFT's format."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def make_adapter(folder: Path, model: str, seed: int, rank: int = 4) -> str:
    """An adapter of queries and values, strong enough to change the model's answers."""
    shape = json.loads((Path(model) / "config.json").read_text())
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    size = shape.get("head_dim") or hidden // heads
    rows = {"q_proj": heads * size, "v_proj": shape["num_key_value_heads"] * size}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(shape["num_hidden_layers"]):
        for name, out in rows.items():
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, hidden, generator=generator)
            tensors[f"{key}.lora_B.weight"] = torch.randn(out, rank, generator=generator)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "bias": "none"}
    config |= {"target_modules": list(rows), "base_model_name_or_path": model}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)
