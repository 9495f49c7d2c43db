# SPDX-License-Identifier: Apache-2.0
"""Common parts of a graph's processes."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from components import process


def test_garbage_collections_leave_out_what_was_there_when_a_process_became_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_MIGRATE_READY_FILE", str(tmp_path / "ready"))
    before = gc.get_freeze_count()
    try:
        process.ready.cache_clear()
        process.ready()
        assert gc.get_freeze_count() > before
        frozen = gc.get_freeze_count()
        kept = [{} for _ in range(1000)]  # type: ignore[var-annotated]
        process.ready()
        assert gc.get_freeze_count() <= frozen + len(kept) // 2
    finally:
        process.ready.cache_clear()
    assert (tmp_path / "ready").exists()
