# SPDX-License-Identifier: Apache-2.0
"""Files of a model that determine tokens beside its weights: its tokenizer's, its end-of-text tokens and defaults.

Grammars, ends of answers and sampling defaults depend on them. Chat templates, which a worker never reads, do not
count.
"""

from __future__ import annotations

import hashlib
import json

from components.models.weights import folder_of

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "merges.txt",
)
GENERATION = ("generation_config.json",)
_WITHOUT = ("chat_template", "name_or_path", "transformers_version", "_from_model_config")


def digest(
    names: tuple[str, ...], model: str, revision: str | None = None, download_dir: str | None = None
) -> dict[str, str]:
    """SHA-256, in hexadecimal, of those of these files that the model has here."""
    folder = folder_of(model, revision, download_dir)
    files = [folder / name for name in names] if folder is not None else []
    return {file.name: _of(file.read_bytes()) for file in files if file.is_file()}


def _of(content: bytes) -> str:
    if len(content) < 1 << 20:
        try:
            told = json.loads(content)
        except ValueError:
            told = None
        if isinstance(told, dict):
            kept = {key: value for key, value in told.items() if key not in _WITHOUT}
            content = json.dumps(kept, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()
