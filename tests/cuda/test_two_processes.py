# SPDX-License-Identifier: Apache-2.0
"""KV blocks between two processes with CUDA memory: on one GPU, and between two where there are two."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from benchmarks.transfer.measure import Pair, fetch, pair
from benchmarks.transfer.peer import Shape
from components.errors import MigrateError, TransferCancelled
from components.transfer import Strategy
from components.transfer.data.nixl import nixl_is_available

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

SHAPE = Shape("small", layers=4, kv_heads=2, head_size=64)
BLOCKS = 64
NIXL = {"backends": ("nixl",), "staging_bytes": 8 * 16 * SHAPE.block_bytes}
LANES = {
    "auto": {},
    "cuda_ipc": {"backends": ("cuda_ipc",)},
    "write": NIXL | {"strategy": Strategy.WRITE},
    "staged": NIXL | {"strategy": Strategy.STAGED},
    "tcp": {"backends": ("tcp",)},
}
DEVICES = {"one GPU": ("cuda:0", "cuda:0"), "two GPUs": ("cuda:0", "cuda:1"), "back": ("cuda:1", "cuda:0")}


@pytest.fixture(scope="module", params=[f"{lane}, {where}" for lane in LANES for where in DEVICES])
def two(request: pytest.FixtureRequest) -> Iterator[Pair]:
    lane, _, where = request.param.partition(", ")
    if torch.cuda.device_count() < len(set(DEVICES[where])):
        pytest.skip("needs two GPUs")
    if LANES[lane].get("backends") == ("nixl",) and not nixl_is_available()[0]:
        pytest.skip(nixl_is_available()[1])
    with pair(SHAPE, BLOCKS, DEVICES[where], **LANES[lane]) as case:
        yield case


@pytest.mark.parametrize("count", [1, 17, BLOCKS])
def test_scattered_blocks_arrive_and_no_others_change(two: Pair, count: int) -> None:
    src, dst = random.sample(range(BLOCKS), count), random.sample(range(BLOCKS), count)
    others = sorted(set(range(BLOCKS)) - set(dst))
    for pool in two.parts:
        pool.tensor.view(torch.int16)[dst] = 7
    before = two.agent.checksums(others)
    fetch(two, src, dst)
    assert two.agent.checksums(dst) == two.call("checksums", src)
    assert two.agent.checksums(others) == before


def test_a_transfer_that_is_out_of_time_leaves_the_pair_usable(two: Pair) -> None:
    blocks = list(range(BLOCKS))
    handle = two.agent.fetch(two.peer.ref, blocks, blocks, request_id="late", deadline_s=0.0)
    with pytest.raises(MigrateError):
        handle.wait(10)
    fetch(two, blocks, blocks)
    assert two.agent.checksums(blocks) == two.call("checksums", blocks)


def test_nothing_lands_after_a_transfer_was_cancelled() -> None:
    large = Shape("large", layers=40, kv_heads=8, head_size=128)
    blocks = list(range(200))
    with pair(large, len(blocks), DEVICES["one GPU"], backends=("cuda_ipc",)) as case:
        handle = case.agent.fetch(case.peer.ref, blocks, blocks, request_id="cancelled", deadline_s=20.0)
        handle.cancel()
        with pytest.raises(TransferCancelled):
            handle.wait(10)
        for pool in reversed(case.parts):  # The kernel copies them in order.
            pool.tensor.view(torch.int16).fill_(7)
        torch.cuda.synchronize()
        assert all(bool((pool.tensor.view(torch.int16) == 7).all()) for pool in case.parts)
        assert not handle.unsafe_blocks


def test_many_transfers_in_flight_keep_their_block_lists_apart(two: Pair) -> None:
    order = random.sample(range(BLOCKS), BLOCKS)
    parts = [(order[i : i + 4], order[-4 - i : BLOCKS - i]) for i in range(0, BLOCKS, 4)]
    for pool in two.parts:
        pool.tensor.view(torch.int16).random_()
    handles = [
        two.agent.fetch(two.peer.ref, src, dst, request_id=f"r{n}", deadline_s=20.0)
        for n, (src, dst) in enumerate(parts)
    ]
    for handle in handles:
        handle.wait(30)
    for src, dst in parts:
        assert two.agent.checksums(dst) == two.call("checksums", src)
