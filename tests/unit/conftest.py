# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the unit tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from components import credentials


@pytest.fixture
def use_secret(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path | None], None]]:
    """Configure another secret, or none; processes read theirs once."""

    def use(path: Path | None) -> None:
        monkeypatch.setenv(credentials.VARIABLE, str(path or ""))
        credentials.secret.cache_clear()

    yield use
    credentials.secret.cache_clear()
