# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the unit tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from components import credentials


@pytest.fixture(scope="package", autouse=True)
def dynamo_leaves_logging_alone() -> Iterator[None]:
    """Parts of Dynamo set up the logging of the whole process when they are imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dynamo.runtime.logging.configure_dynamo_logging", lambda *_, **__: None)
        yield


@pytest.fixture
def use_secret(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path | None], None]]:
    """Configure another secret, or none; processes read theirs once."""

    def use(path: Path | None) -> None:
        monkeypatch.setenv(credentials.VARIABLE, str(path or ""))
        credentials.secret.cache_clear()

    yield use
    credentials.secret.cache_clear()


@pytest.fixture
def secret(tmp_path: Path, use_secret: Callable[[Path | None], None]) -> Path:
    """A configured secret."""
    path = tmp_path / "secret"
    path.write_text("c0ffee" * 8 + "\n")
    use_secret(path)
    return path
