# SPDX-License-Identifier: Apache-2.0
"""Two processes move blocks over every lane that a host without GPUs has; all bytes are compared every time."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.credentials import VARIABLE
from components.errors import IncompatibleLayout, MigrateError, TransferError
from tests.integration.transfer_peer import TOKENS, Peer, by_token

pytestmark = [pytest.mark.integration, pytest.mark.slow]
SIZE = 8
BLOCKS = TOKENS // SIZE
LANES: dict[str, dict[str, Any]] = {
    "shm/mapped": {"share": True},
    "nixl/ucx/cma": {"backends": ("nixl",), "transport": "shm"},
    "nixl/ucx/tcp": {"backends": ("nixl",), "transport": "tcp"},
    "tcp/sockets": {"backends": ("tcp",)},
}


@contextmanager
def pair(ours: dict[str, Any], theirs: dict[str, Any]) -> Iterator[tuple[Peer, Peer]]:
    """A source and a destination that know each other."""
    common = {"block_size": SIZE}
    peers = [Peer("src", seed=1, **(common | theirs)), Peer("dst", seed=2, **(common | ours))]
    try:
        peers[1].meet(peers[0])
        peers[0].meet(peers[1])
        yield peers[0], peers[1]
    finally:
        for peer in peers:
            peer.end()


@pytest.fixture(scope="module", params=LANES)
def two(request: pytest.FixtureRequest) -> Iterator[tuple[Peer, Peer, str]]:
    with pair(LANES[request.param], LANES[request.param]) as (src, dst):
        yield src, dst, request.param


@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_exactly_the_named_blocks_arrive(two: tuple[Peer, Peer, str], data: st.DataObject) -> None:
    src, dst, lane = two
    put = data.draw(st.lists(st.integers(0, BLOCKS - 1), unique=True, max_size=BLOCKS))
    take = data.draw(st.lists(st.integers(0, BLOCKS - 1), min_size=len(put), max_size=len(put)))
    dst.ask("refill", data.draw(st.integers(3, 99)))
    there, before = by_token(src.data(), SIZE), by_token(dst.data(), SIZE)
    moved, took = dst.fetch(src, take, put)
    assert moved == len(put) * sum(row.shape[1] for row in there) * SIZE
    assert took == lane if put else took.startswith(lane.rpartition("/")[0])
    for source, old, now in zip(there, before, by_token(dst.data(), SIZE), strict=True):
        expected = old.view(BLOCKS, -1).clone()
        if put:
            expected[put] = source.view(BLOCKS, -1)[take]
        assert torch.equal(now.view(BLOCKS, -1), expected)


@given(
    take=st.lists(st.integers(-2, BLOCKS + 1), max_size=BLOCKS),
    put=st.lists(st.integers(-2, BLOCKS + 1), max_size=BLOCKS),
)
@settings(max_examples=15, deadline=None)
def test_lists_that_do_not_fit_change_nothing(two: tuple[Peer, Peer, str], take: list[int], put: list[int]) -> None:
    src, dst, _ = two
    valid = all(0 <= block < BLOCKS for block in (*take, *put))
    if valid and len(take) == len(put) and len(set(put)) == len(put):
        return
    before = by_token(dst.data(), SIZE)
    with pytest.raises(TransferError):
        dst.fetch(src, take, put)
    assert all(torch.equal(a, b) for a, b in zip(before, by_token(dst.data(), SIZE), strict=True))


def test_ranks_are_paired_one_to_one() -> None:
    lane = LANES["tcp/sockets"]
    ranks = [Peer(f"{side}-{r}", SIZE, 10 + r, tp_rank=r, tp_size=2, **lane) for r in (0, 1) for side in "sd"]
    lone = Peer("lone", SIZE, 20, **lane)
    sources, destinations = ranks[::2], ranks[1::2]
    try:
        for dst in destinations:
            for other in (*sources, lone):
                dst.meet(other)
        for src, dst in zip(sources, destinations, strict=True):
            dst.fetch(src, [0, 1], [0, 1])
        with pytest.raises(IncompatibleLayout, match="tp_rank"):
            destinations[0].fetch(sources[1], [0], [0])
        with pytest.raises(IncompatibleLayout, match="tp_size"):
            destinations[0].fetch(lone, [0], [0])
    finally:
        for peer in (*ranks, lone):
            peer.end()


@pytest.mark.parametrize("lane", LANES)
def test_a_killed_source_is_one_error_and_leaves_nothing_behind(lane: str) -> None:
    before = set(os.listdir("/dev/shm"))
    with pair(LANES[lane], LANES[lane]) as (src, dst):
        dst.fetch(src, [1], [1])
        data = by_token(dst.data(), SIZE)
        os.kill(src.process.pid, signal.SIGKILL)
        src.process.wait()
        with pytest.raises(MigrateError):
            dst.ask("fetch", "src", [2, 3], [2, 3], 5.0)
        assert all(torch.equal(a, b) for a, b in zip(data, by_token(dst.data(), SIZE), strict=True))
    assert {name for name in os.listdir("/dev/shm") if name.startswith("torch_")} <= before


@pytest.mark.parametrize("lane", ["shm/mapped", "nixl/ucx/tcp", "tcp/sockets"])
def test_processes_of_different_secrets_give_each_other_no_block(
    lane: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = LANES[lane] | ({"backends": ("mapped",)} if lane == "shm/mapped" else {"strategy": "write"})
    peers = []
    try:
        for number, name in enumerate(("src", "dst")):
            path = tmp_path / name
            path.write_bytes(os.urandom(32))
            monkeypatch.setenv(VARIABLE, str(path))
            peers.append(Peer(name, SIZE, number, **settings))
        src, dst = peers
        src.meet(dst), dst.meet(src)
        before = by_token(dst.data(), SIZE)
        with pytest.raises(MigrateError) as caught:
            dst.fetch(src, [1, 2], [1, 2], deadline_s=3.0)
        # Elsewhere the log says it: mapped memory leaves the pair to other lanes, and NIXL's source is silent.
        assert VARIABLE in str(caught.value) or lane != "tcp/sockets"
        assert all(torch.equal(a, b) for a, b in zip(before, by_token(dst.data(), SIZE), strict=True))
    finally:
        for peer in peers:
            peer.end()
