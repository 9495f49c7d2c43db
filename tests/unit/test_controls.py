# SPDX-License-Identifier: Apache-2.0
"""An engine whose weights or memory change while it serves is told apart from what it was."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from components.worker.controls import Controls


class Llm:
    """An ``AsyncLLM`` whose calls into its workers do nothing, or fail."""

    vllm_config = SimpleNamespace(load_config=SimpleNamespace(load_format="auto"))

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.calls: list[Any] = []

    async def collective_rpc(
        self, method: Any, timeout: float | None = None, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> list[int]:
        self.calls.append((method, timeout, args, kwargs))
        if self.fails:
            raise RuntimeError("half of it was loaded")
        return [1]

    async def sleep(self, level: int = 1, mode: str = "abort") -> None:
        self.calls.append((level, mode))

    async def pause_generation(self, *, mode: str = "abort") -> None:
        self.calls.append(mode)
        if self.fails:
            raise RuntimeError("not paused")

    async def resume_generation(self) -> None:
        self.calls.append("resume")


class Watcher:
    """A worker's status."""

    def __init__(self) -> None:
        self.seen = ["start"]
        self.paused = False

    def become(self, fingerprint: str) -> None:
        self.seen.append(fingerprint)


def worker(fails: bool = False) -> tuple[Llm, list[str]]:
    """An engine and the fingerprints that it has had."""
    llm, watcher = Llm(fails), Watcher()
    Controls(llm).follow("start", watcher)
    return llm, watcher.seen


@pytest.fixture
def checkpoints(tmp_path: Path) -> list[Path]:
    """Two steps of a training, and a copy of the first one."""
    folders = [tmp_path / name for name in ("one", "two", "copy")]
    for folder, value in zip(folders, (1.0, 2.0, 1.0), strict=True):
        folder.mkdir()
        save_file({"weight": torch.full((4,), value)}, folder / "model.safetensors")
    return folders


async def load(llm: Llm, folder: Path) -> None:
    await llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})


async def test_workers_that_have_loaded_the_same_files_in_the_same_order_are_equal(checkpoints: list[Path]) -> None:
    one, two, copy = checkpoints
    (a, of_a), (b, of_b), (c, of_c) = worker(), worker(), worker()
    await load(a, one)
    assert len(of_a) == 3, "while they are loaded it is equal to none"
    await load(b, copy)
    assert of_a[-1] == of_b[-1] and len({"start", of_a[1], of_b[1], of_a[-1]}) == 4
    await load(a, two)
    assert of_a[-1] != of_b[-1]
    await load(b, two)
    assert of_a[-1] == of_b[-1]
    await load(c, two)
    assert of_c[-1] != of_a[-1], "a checkpoint may have a part of the weights"
    assert a.calls[0] == ("reload_weights", None, (), {"weights_path": str(one)})


@pytest.mark.parametrize("method", ["update_weights_from_path", "update_weights", "anything", print])
async def test_after_an_update_of_unknown_contents_no_worker_is_equal(method: Any, checkpoints: list[Path]) -> None:
    (a, of_a), (b, of_b) = worker(), worker()
    assert await a.collective_rpc(method, kwargs={"version": "5"}) == [1]
    await b.collective_rpc(method, kwargs={"version": "5"})
    assert len({"start", of_a[-1], of_b[-1]}) == 3
    await load(a, checkpoints[0])
    await load(b, checkpoints[0])
    assert of_a[-1] != of_b[-1]


async def test_after_a_failed_update_no_worker_is_equal(checkpoints: list[Path]) -> None:
    (a, of_a), (b, of_b) = worker(fails=True), worker(fails=True)
    for llm in (a, b):
        with pytest.raises(RuntimeError, match="half"):
            await load(llm, checkpoints[0])
    assert len({"start", of_a[-1], of_b[-1]}) == 3


async def test_a_folder_that_is_missing_has_no_contents(tmp_path: Path) -> None:
    (a, of_a), (b, of_b) = worker(), worker()
    await load(a, tmp_path / "no")
    await load(b, tmp_path / "no")
    assert of_a[-1] != of_b[-1]


async def test_sleep_gives_the_memory_of_the_cache_back() -> None:
    llm, seen = worker()
    await llm.sleep(2, mode="keep")
    assert llm.calls == [(2, "keep")] and len(seen) == 2


async def test_calls_that_change_no_weight_change_nothing() -> None:
    llm, seen = worker()
    for method in ("liveness_probe", "init_broadcaster", "destroy_broadcaster"):
        await llm.collective_rpc(method, kwargs={})
    assert seen == ["start"]


async def test_nothing_arrives_at_a_paused_engine() -> None:
    llm, watcher = Llm(), Watcher()
    Controls(llm).follow("start", watcher)
    await llm.pause_generation(mode="keep")
    assert watcher.paused and watcher.seen == ["start"]
    await llm.resume_generation()
    assert not watcher.paused and llm.calls == ["keep", "resume"]
    llm.fails = True
    with pytest.raises(RuntimeError):
        await llm.pause_generation()
    assert not watcher.paused
