# SPDX-License-Identifier: Apache-2.0
"""Ten thousand transfers leave memory, descriptors and mappings as they were."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import psutil
import pytest
import torch

from components.transfer import AgentConfig, KVPool, TransferAgent

pytestmark = [pytest.mark.integration, pytest.mark.slow]
BLOCKS = 64
WARM, MORE = 2000, 10_000


def held() -> tuple[float, int, int]:
    """MiB of resident memory, open descriptors, mapped regions."""
    maps = len(Path("/proc/self/maps").read_text().splitlines())
    return psutil.Process().memory_info().rss / 2**20, len(os.listdir("/proc/self/fd")), maps


@pytest.mark.parametrize("lane", ["mapped", "nixl", "tcp"])
def test_nothing_grows(lane: str) -> None:
    namespace = uuid.uuid4().hex
    agents = []
    for name in ("src", "dst"):
        parts = [KVPool(f"layer.{i}", torch.full((BLOCKS, 4096), i + 1.0), BLOCKS, 0) for i in range(4)]
        for part in parts:
            part.tensor.share_memory_()
        agent = TransferAgent(AgentConfig(name=name, namespace=namespace, backends=(lane,)))
        agent.start(parts)
        agents.append(agent)
    src, dst = agents

    def move(count: int) -> None:
        for number in range(count):
            take = [number % BLOCKS, (number * 7 + 1) % BLOCKS]
            put = [(number + 1) % BLOCKS, (number + 5) % BLOCKS]
            dst.fetch(src.ref, take, put, request_id=f"r{number}", deadline_s=20).wait(30)

    try:
        move(WARM)
        before = held()
        move(MORE)
        after = held()
    finally:
        dst.close()
        src.close()
    print(f"{lane}: MiB {before[0]:.1f} -> {after[0]:.1f}, descriptors {before[1:]} -> {after[1:]}")
    assert after[1] <= before[1] + 2 and after[2] <= before[2] + 8, (before, after)
    # An allocator's own noise; a leaked kilobyte for each transfer would be ten MiB.
    assert after[0] - before[0] < 8.0, (before, after)
