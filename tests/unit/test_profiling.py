# SPDX-License-Identifier: Apache-2.0
"""NVTX ranges of every phase, and none while profiling is off."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import uuid

import pytest
import torch

from components.transfer import (
    AgentConfig,
    KVPool,
    Strategy,
    TransferAgent,
    nixl_is_available,
    profiling,
)

BLOCKS = 16


class Recorder:
    """In place of nvtx's domain: keeps ranges; notices those that are ended twice, never, or on another thread."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.open: list[object] = []
        self.lock = threading.Lock()

    def get_event_attributes(self, message: str) -> str:
        return message

    def push_range(self, name: str) -> None:
        with self.lock:
            self.names.append(name)
            self.open.append(threading.get_ident())

    def pop_range(self) -> None:
        with self.lock:
            self.open.remove(threading.get_ident())

    def start_range(self, name: str) -> object:
        mark = object()
        with self.lock:
            self.names.append(name)
            self.open.append(mark)
        return mark

    def end_range(self, mark: object) -> None:
        with self.lock:
            self.open.remove(mark)

    def phases(self) -> set[str]:
        return {name.split()[0] for name in self.names}


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setattr(profiling, "domain", made)
    return made


def agents(shared: bool, **more: object) -> tuple[TransferAgent, TransferAgent]:
    namespace = uuid.uuid4().hex
    made = []
    for name in ("src", "dst"):
        parts = [KVPool("layer.0", torch.zeros((BLOCKS, 4096), dtype=torch.uint8), BLOCKS, 0)]
        if shared:
            parts[0].tensor.share_memory_()
        agent = TransferAgent(AgentConfig(name=name, namespace=namespace, **more))  # type: ignore[arg-type]
        agent.start(parts)
        made.append(agent)
    return made[0], made[1]


CASES: dict[str, tuple[dict[str, object], set[str]]] = {
    "mapped": ({"backends": ("mapped",)}, {"post", "wire"}),
    "direct": ({"backends": ("nixl",), "strategy": Strategy.READ}, {"post", "wire"}),
    "staged": ({"backends": ("nixl",), "strategy": Strategy.STAGED}, {"gather", "post", "wire", "scatter"}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_phase_of_a_transfer_is_a_range_and_every_range_ends(case: str, recorder: Recorder) -> None:
    more, phases = CASES[case]
    if "nixl" in str(more["backends"]) and not nixl_is_available()[0]:
        pytest.skip(nixl_is_available()[1])
    src, dst = agents(shared=case == "mapped", **more)
    dst.fetch(src.ref, [1, 5, 3], [2, 4, 9], request_id="r", deadline_s=20).wait(30)
    src.close()
    dst.close()
    assert recorder.phases() == phases
    assert recorder.open == []
    assert any("0.0123 MB" in name for name in recorder.names)


def test_without_the_switch_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert profiling.domain_of(False) is None
    monkeypatch.setattr(profiling, "domain", None)
    with profiling.span("gather"):
        assert profiling.begin("wire") is None
    profiling.end(None)


def test_the_switch_takes_the_nvtx_package() -> None:
    pytest.importorskip("nvtx")
    code = (
        "from components.transfer import profiling\n"
        "with profiling.span('gather', 1000):\n    profiling.end(profiling.begin('wire'))\n"
        "print(profiling.domain is not None)\n"
    )
    environment = os.environ | {profiling.SWITCH: "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout.strip() == "True", done.stderr
