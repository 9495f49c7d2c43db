# SPDX-License-Identifier: Apache-2.0
"""Further models for tests and benchmarks, with random weights: families, drafters, quantised ones, one that sees."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.models.drafting import DRAFTING
from benchmarks.models.families import FAMILIES
from benchmarks.models.quantised import QUANTISED
from benchmarks.models.seeing import SEEING
from components import models
from components.models import tiny


def _family(architecture: tuple[str, str], fields: dict[str, Any]) -> Callable[[Any, Path], None]:
    return lambda tokenizer, target: tiny.write(architecture, fields, tokenizer, target)


MAKERS: dict[str, Callable[[Any, Path], None]] = {
    **{name: _family(*FAMILIES[name]) for name in FAMILIES},
    **{name: partial(tiny.make, name) for name in tiny.FAMILIES},
    **DRAFTING,
    **QUANTISED,
    **SEEING,
}
"""Each writes a model and its tokenizer into a folder."""


def resolve(model: str) -> str:
    """``components.models.resolve``, which also knows these."""
    if model not in MAKERS:
        return models.resolve(model)
    return str(models.made(model, lambda target: MAKERS[model](models.tokenizer(), target), Console(stderr=True)))
