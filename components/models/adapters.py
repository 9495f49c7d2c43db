# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters of a model: folders in PEFT's format, checked before the start.

Two workers may exchange the KV of a request only when its adapter is equal on both, byte for byte: agents compare
``digest``. Raises ``ConfigError``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from components.errors import ConfigError

_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks for which vLLM has memory layouts."""


def check(adapters: Mapping[str, str], model_names: tuple[str, ...] = ()) -> None:
    """Raise for an incomplete folder, or for an adapter with the model's name."""
    for name, folder in adapters.items():
        if not name or name in model_names:
            raise ConfigError(f"lora-modules: {name!r} is the model's own name; give the adapter another one")
        _files(name, folder)
    max_rank(adapters)


def max_rank(adapters: Mapping[str, str]) -> int:
    """The smallest of vLLM's ranks that holds every adapter."""
    largest = 1
    for name, folder in adapters.items():
        config, _ = _files(name, folder)
        try:
            rank = json.loads(config.read_bytes())["r"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"lora-modules: {config} is damaged ({error!r}); copy it again") from error
        if not isinstance(rank, int) or not 1 <= rank <= _RANKS[-1]:
            raise ConfigError(f"lora-modules: adapter {name!r} has rank {rank!r}; vLLM takes 1 to {_RANKS[-1]}")
        largest = max(largest, rank)
    return next(rank for rank in _RANKS if rank >= largest)


def digest(adapters: Mapping[str, str]) -> str:
    """SHA-256 over names and contents, in hexadecimal; empty without adapters."""
    if not adapters:
        return ""
    total = hashlib.sha256()
    for name, folder in sorted(adapters.items()):
        total.update(name.encode() + b"\0")
        for path in _files(name, folder):
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _files(name: str, folder: str) -> tuple[Path, Path]:
    path = Path(folder).expanduser()
    config = path / _CONFIG
    weights = next((path / file for file in _WEIGHTS if (path / file).is_file()), None)
    if not config.is_file() or weights is None:
        lacks = _CONFIG if not config.is_file() else " or ".join(_WEIGHTS)
        raise ConfigError(f"lora-modules: the folder {folder} of adapter {name!r} has no {lacks}: give a PEFT folder")
    return config, weights
