# SPDX-License-Identifier: Apache-2.0
"""Drafters with random weights for speculative decoding, as ``components/models/tiny.py`` makes models.

They look at the token alone: of what a drafter is given, the model's hidden state is left out. Some of their drafts are
accepted.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.models.families import DEEPSEEK, LARGE, MLA
from components.models.tiny import sizes

_LOUD = 250


def _eagle(tokenizer: Any, target: Path) -> None:
    """For ``tiny-llama``: all of its layers, on the token's embedding."""
    import torch
    import transformers

    config = transformers.LlamaConfig(**sizes(tokenizer))
    torch.manual_seed(0)
    made: Any = transformers.LlamaForCausalLM
    state = _layer(made(config).to(torch.bfloat16).state_dict(), "model.layers.", "layers.")
    # EAGLE has no norm before the first layer: its weights are larger by what the norm would do.
    del state["layers.0.input_layernorm.weight"]
    for name in "qkv":
        state[f"layers.0.self_attn.{name}_proj.weight"] /= config.initializer_range
    size = config.hidden_size
    _save(
        config,
        "LlamaForCausalLM",
        state | {"fc.weight": torch.eye(size, 2 * size, dtype=torch.bfloat16)},
        tokenizer,
        target,
    )


def _mimo(tokenizer: Any, target: Path) -> None:
    """A model with a layer that predicts one token more (MTP), which is its first layer again."""
    import torch
    import transformers

    wide = {"num_attention_heads": 2, "tie_word_embeddings": False}
    config = transformers.Qwen2Config(**(sizes(tokenizer) | wide))
    config.num_nextn_predict_layers = 1
    torch.manual_seed(0)
    made: Any = transformers.Qwen2ForCausalLM
    state = made(config).to(torch.bfloat16).state_dict()
    drafter, size = "model.mtp_layers.0.", config.hidden_size
    none = torch.zeros(size, size, dtype=torch.bfloat16)
    state |= _layer(state, "model.layers.0.", drafter) | {
        f"{drafter}input_proj.weight": torch.cat(
            [none, torch.eye(size, dtype=torch.bfloat16) * config.initializer_range], dim=1
        ),
    }
    for norm in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
        state[f"{drafter}{norm}.weight"] = torch.ones(size, dtype=torch.bfloat16)
    _save(config, "MiMoForCausalLM", state, tokenizer, target)


def _deepseek(tokenizer: Any, target: Path) -> None:
    """The same beside compressed heads. Embeddings are so large that they often decide the next token by themselves."""
    import torch
    import transformers

    config = transformers.DeepseekV3Config(
        **(sizes(tokenizer) | LARGE | MLA | DEEPSEEK | {"num_hidden_layers": 5, "num_nextn_predict_layers": 1})
    )
    torch.manual_seed(0)
    made: Any = transformers.DeepseekV3ForCausalLM
    state = made(config).to(torch.bfloat16).state_dict()
    state["model.embed_tokens.weight"] *= _LOUD
    config.num_hidden_layers -= 1
    layer, size = f"model.layers.{config.num_hidden_layers}.", config.hidden_size
    state |= {
        f"{layer}eh_proj.weight": torch.eye(size, 2 * size, dtype=torch.bfloat16) * _LOUD * config.initializer_range,
        f"{layer}embed_tokens.weight": state["model.embed_tokens.weight"],
        f"{layer}shared_head.head.weight": state["lm_head.weight"],
    }
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        state[f"{layer}{norm}.weight"] = torch.ones(size, dtype=torch.bfloat16)
    _save(config, "DeepseekV3ForCausalLM", state, tokenizer, target)


def _layer(state: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    """Weights of one layer under another name."""
    return {new + name.removeprefix(old): value for name, value in state.items() if name.startswith(old)}


def _save(config: Any, architecture: str, state: dict[str, Any], tokenizer: Any, target: Path) -> None:
    from safetensors.torch import save_file

    config.architectures, config.dtype = [architecture], "bfloat16"
    config.save_pretrained(target)
    save_file({name: value.clone().contiguous() for name, value in state.items()}, target / "model.safetensors")
    tokenizer.save_pretrained(target)


DRAFTING: dict[str, Callable[[Any, Path], None]] = {
    "tiny-llama-eagle": _eagle,
    "tiny-mimo": _mimo,
    "tiny-deepseek-mtp": _deepseek,
}
