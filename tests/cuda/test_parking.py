# SPDX-License-Identifier: Apache-2.0
"""KV of a GPU parked in pinned memory and in files, and brought back."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from components.transfer import AgentConfig, KVPool, Place, TransferAgent

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
BLOCKS = 256


@pytest.mark.parametrize("place", list(Place))
@pytest.mark.parametrize("count", [1, 100])
def test_what_was_parked_comes_back(tmp_path: Path, place: Place, count: int) -> None:
    shape = (BLOCKS, 2, 16, 8, 128)
    parts = [KVPool(f"layer.{n}", torch.randn(shape, device="cuda").bfloat16(), BLOCKS, 0) for n in range(8)]
    config = AgentConfig(name="one", park_host_bytes=512 << 20, park_dir=str(tmp_path / "park"))
    agent = TransferAgent(config)
    agent.start(parts)
    blocks, target = random.sample(range(BLOCKS), count), random.sample(range(BLOCKS), count)
    sums = agent.checksums(blocks)
    done = agent.parking.park(place, blocks, request_id="r", deadline_s=20).wait(30)
    assert done.ticket is not None
    for part in parts:
        part.tensor[target] = 0
    others = sorted(set(range(BLOCKS)) - set(target))
    before = agent.checksums(others)
    back = agent.parking.restore(done.ticket, target, deadline_s=20).wait(30)
    assert agent.checksums(target) == sums and agent.checksums(others) == before
    speeds = [each.bytes / each.wire_s / 1e9 for each in (done, back)]
    print(f"{place} over {back.lane}: {speeds[0]:.1f} GB/s out, {speeds[1]:.1f} back")
    agent.close()
