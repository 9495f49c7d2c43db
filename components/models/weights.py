# SPDX-License-Identifier: Apache-2.0
"""Weight files of a model: their completeness and their identity.

``check`` raises ``ConfigError`` before the start: vLLM's refusal comes late, and names no file.
Agents compare ``digest``, so that KV of a fine-tune or a new revision never serves another model. It reads names,
sizes, headers and a few hundred pages spread over the files, which takes milliseconds for many gigabytes too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from components.errors import ConfigError

_KINDS = (("*.safetensors",), ("*.bin", "*.pt"))
"""Files with weights; the first kind that the folder has counts."""
_TORCH = ("npcache", "pt")
"""Load formats of vLLM that read the second kind alone."""
_CHECKED = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "mistral")
"""Load formats that read whole safetensors files of the model's folder."""
_PAGE = 4096
_PAGES = 256
"""Pages read of all files together; at least two of each file."""
_LONGEST_HEADER = 64 << 20
_SCALES = ("k_scale", "v_scale", "q_scale", "prob_scale", "_proj.output_scale")
"""Ends of the names of scales of a quantised KV cache, which a calibration changes alone: two or so of each layer."""


def _files(folder: Path, load_format: str) -> list[Path]:
    kinds = _KINDS[1:] if load_format in _TORCH else _KINDS
    found = (sorted(file for pattern in kind for file in folder.glob(pattern)) for kind in kinds)
    return next(filter(None, found), [])


def check(model: str, load_format: str) -> None:
    """Raise when the model's folder has no weights or incomplete ones. Ignores formats that read other files."""
    from safetensors import SafetensorError, safe_open

    folder = Path(model)
    if not os.path.isdir(model) or load_format not in _CHECKED:
        return
    if not (found := _files(folder, load_format)):
        raise ConfigError(
            f"model folder {model} has no weights (*.safetensors, *.bin or *.pt): copy it again, or name another "
            "load_format in engine-args (dummy makes random weights)"
        )
    file = folder / "model.safetensors.index.json"
    # The index is of Hugging Face's files; vLLM takes Mistral's own instead where a folder has both.
    indexed = file.is_file() and not any(folder.glob("consolidated*.safetensors"))
    try:
        names = sorted(set(json.loads(file.read_text())["weight_map"].values())) if indexed else []
        for file in [*(folder / name for name in names), *found]:
            if file.suffix == ".safetensors":
                with safe_open(file, "np"):
                    pass
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"model file {file} is missing or not whole ({error}): copy it again") from error


def digest(model: str, load_format: str, revision: str | None = None, download_dir: str | None = None) -> str:
    """SHA-256 over the weights, in hexadecimal: equal for equal copies in other folders.

    Without local weights (random ones, an object store): over name, revision and format.
    """
    total = hashlib.sha256()
    folder = folder_of(model, revision, download_dir)
    found = [] if folder is None or load_format == "dummy" else _files(folder, load_format)
    for file in found:
        size = file.stat().st_size
        total.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as content:
            for start, length in _samples(content.fileno(), file, size, max(2, _PAGES // len(found))):
                total.update(os.pread(content.fileno(), length, start))
    if not found:
        # Random weights are equal for all models of a shape.
        total.update(repr((load_format, None if load_format == "dummy" else (model, revision))).encode())
    elif folder is not None:
        for index in sorted(folder.glob("*.index.json")):
            total.update(index.read_bytes())
    return total.hexdigest()


def folder_of(model: str, revision: str | None, download_dir: str | None) -> Path | None:
    """The model's folder, or that of its name in Hugging Face's cache."""
    if os.path.isdir(model):
        return Path(model)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(model, "config.json", cache_dir=download_dir, revision=revision)
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def _samples(descriptor: int, file: Path, size: int, count: int) -> Iterator[tuple[int, int]]:
    """Places to read: the header, the middles of some tensors and all KV scales, or pages at equal distances."""
    header = _header(descriptor, size) if file.suffix == ".safetensors" else None
    if header is None:
        yield from ((size * n // count, _PAGE) for n in range(count))
        return
    length, tensors = header
    yield 0, length
    # Chosen by the hash of their names: a fine-tune may change one kind of tensor, which has equal distances.
    names = sorted(tensors, key=lambda name: hashlib.sha256(name.encode()).digest())
    for name in dict.fromkeys([*names[:count], *(name for name in names if name.endswith(_SCALES))]):
        begin, end = tensors[name]
        yield length + begin + max(0, end - begin - _PAGE) // 2, min(_PAGE, end - begin)


def _header(descriptor: int, size: int) -> tuple[int, dict[str, tuple[int, int]]] | None:
    """Bytes before the first tensor of a safetensors file, and the offsets of its tensors behind them."""
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if not 0 < length <= min(size - 8, _LONGEST_HEADER):
        return None
    try:
        entries: dict[str, Any] = json.loads(os.pread(descriptor, length, 8))
        found = {name: entry["data_offsets"] for name, entry in entries.items() if name != "__metadata__"}
        return 8 + length, {name: (int(begin), int(end)) for name, (begin, end) in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
