# SPDX-License-Identifier: Apache-2.0
"""Folders for a graph's processes when the user's are unwritable or have long paths."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from components.errors import ConfigError
from components.models import cache_folder
from components.serve import places
from components.serve.places import CARDS, LONGEST, SOCKETS, Places
from components.serve.state import State

NOWHERE = "/proc/nohome"


@pytest.fixture
def short() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="dm-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch, short: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path_factory.getbasetemp()  # All tests' folders are in it: it must not be in one that goes away.
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    return short


def test_what_the_user_has_is_taken_when_it_does(temporary: Path, tmp_path: Path) -> None:
    found = Places({"HOME": str(tmp_path)})
    assert set(found.variables) == {SOCKETS} and not found.said
    sockets = Path(found.variables[SOCKETS])
    assert sockets.parent == temporary and len(str(sockets)) <= LONGEST
    found.close()
    assert not sockets.exists()


@pytest.mark.parametrize("home", [{}, {"HOME": ""}, {"HOME": NOWHERE}])
def test_a_home_that_cannot_be_written_is_replaced_and_said(home: dict[str, str], temporary: Path) -> None:
    found = Places(home)
    [said] = found.said
    assert "HOME" in said and found.variables["HOME"] in said
    assert (Path(found.variables["HOME"]) / CARDS).is_dir()
    found.close()
    assert list(temporary.iterdir()) == []


def test_models_are_still_found_in_a_home_that_cannot_be_written(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tmp_path / ".cache" / "huggingface"
    models.mkdir(parents=True)
    monkeypatch.setattr(places, "home_is_usable", lambda environment: False)
    assert Places({"HOME": str(tmp_path)}).variables["HF_HOME"] == str(models)
    assert "HF_HOME" not in Places({"HOME": str(tmp_path), "HF_HOME": "/models"}).variables


def test_a_long_folder_for_temporary_files_is_not_taken_for_sockets(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = temporary / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    found = Places({"HOME": str(tmp_path)})
    assert len(found.variables[SOCKETS]) <= LONGEST
    found.close()


def test_the_users_own_folder_for_sockets_stays_or_is_refused(temporary: Path, tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    assert SOCKETS not in Places(home | {SOCKETS: str(temporary)}).variables
    for wrong in (NOWHERE, f"/tmp/{'x' * 100}"):
        with pytest.raises(ConfigError, match=SOCKETS):
            Places(home | {SOCKETS: wrong})


def test_a_user_without_a_name_gets_one(temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000)
    assert Places({"HOME": str(tmp_path)}).variables["USER"] == "user4000000"
    assert "USER" not in Places({"HOME": str(tmp_path), "USER": "me"}).variables


def test_without_any_folder_for_temporary_files_one_error_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def none() -> str:
        raise FileNotFoundError("No usable temporary directory")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(ConfigError, match="TMPDIR"):
        Places({"HOME": str(tmp_path)})


def test_models_and_state_have_a_folder_without_a_home(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DYN_MIGRATE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", NOWHERE)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/nobody")
    own = temporary / f"dynamo-migrate-{os.getuid()}"
    assert cache_folder() == own and own.stat().st_mode & 0o777 == 0o700
    assert State.of_this_process("n", "e", 1).path.parent == own / "dynamo-migrate-run"
    own.chmod(0o777)
    with pytest.raises(ConfigError, match="not this user's own"):
        cache_folder()
    monkeypatch.setenv("DYN_MIGRATE_CACHE", NOWHERE)
    with pytest.raises(ConfigError, match="DYN_MIGRATE_CACHE"):
        cache_folder()
