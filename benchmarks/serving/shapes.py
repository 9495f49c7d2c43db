# SPDX-License-Identifier: Apache-2.0
"""Model folders of a well-known shape without weights: ``python -m benchmarks.serving.shapes llama-3.1-8b FOLDER``.

For ``--load-format dummy``. Tokenizer and vocabulary size are those of tiny-llama, so that every token has a text.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from components import models
from components.errors import ConfigError

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    },
}
"""Keys of the publishers' ``config.json``."""


def folder(model: str) -> Path:
    """Folder of a model for a benchmark. Makes a missing shape; ``components.models`` has all other models."""
    if model not in SHAPES:
        return Path(models.resolve(model))
    made = models.cache_folder() / "models" / model
    if not (made / "config.json").is_file():
        make(model, made)
    return made


def make(shape: str, target: Path) -> None:
    """Write the folder. Raises ``ConfigError``."""
    if shape not in SHAPES:
        raise ConfigError(f"there is no shape {shape!r}; known: {', '.join(SHAPES)}")
    source = Path(models.resolve("tiny-llama"))
    target.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(source / name, target / name)
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | SHAPES[shape] | {"dtype": "bfloat16"}, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.shapes", description=__doc__)
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("folder", type=Path, help="folder to write")
    arguments = parser.parse_args()
    make(arguments.shape, arguments.folder)
