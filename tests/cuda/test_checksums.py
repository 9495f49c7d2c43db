# SPDX-License-Identifier: Apache-2.0
"""Checksums of blocks that the GPU still computes: queued behind that work, without waiting."""

from __future__ import annotations

import pytest
import torch

from components.transfer.checksum import BlockChecksums
from components.transfer.config import KVPool
from components.transfer.regions import regions_of
from components.transfer.shares import Shares

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def test_beginning_a_checksum_does_not_wait_for_the_device() -> None:
    pools = [KVPool(f"layer{n}", torch.zeros(64, 2, 16, 8, 64, device="cuda"), 64, 0) for n in range(4)]
    sums = BlockChecksums(Shares(regions_of(pools)))
    sums.of([1, 2])  # Weights and pinned memory are there from now on.
    torch.cuda._sleep(2_000_000_000)
    for pool in pools:
        pool.tensor[5] = 3.0
    begun = sums.begin([4, 5])
    assert not torch.cuda.current_stream().query(), "it has waited"
    assert begun() == sums.of([4, 5])
    assert begun()[0] != begun()[1]
