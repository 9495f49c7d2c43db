# SPDX-License-Identifier: Apache-2.0
"""Blocks over TCP between two "hosts": namespaces joined by a cable that delays, loses packets or is cut."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from components.errors import MigrateError
from tests.integration.networks import ADDRESSES, Cable, plug, slow_cable, veth
from tests.integration.transfer_peer import TOKENS, Peer, by_token

pytestmark = [pytest.mark.integration, pytest.mark.slow]
SIZE = 8
LANES: dict[str, dict[str, Any]] = {
    "nixl/ucx/tcp": {"backends": ("nixl",), "transport": "tcp"},
    "tcp/sockets": {"backends": ("tcp",)},
}


@contextmanager
def pair(cable: Cable, lane: str) -> Iterator[tuple[Peer, Peer]]:
    peers = [
        Peer(name, SIZE, seed, cable.prefix(side), advertise_host=ADDRESSES[side], share=True, **LANES[lane])
        for side, (name, seed) in enumerate((("src", 1), ("dst", 2)))
    ]
    try:
        peers[1].meet(peers[0])
        peers[0].meet(peers[1])
        yield peers[0], peers[1]
    finally:
        for peer in peers:
            peer.end()


def moved(src: Peer, dst: Peer, lane: str, deadline_s: float = 20.0) -> None:
    """All blocks of the source, in another order, compared."""
    put = [3, 0, 5, 1, 4, 2]
    assert dst.fetch(src, list(range(TOKENS // SIZE)), put, deadline_s)[1] == lane
    for there, here in zip(by_token(src.data(), SIZE), by_token(dst.data(), SIZE), strict=True):
        assert torch.equal(here.view(len(put), -1)[put], there.view(len(put), -1))


@pytest.mark.parametrize("lane", LANES)
def test_a_cut_cable_is_one_error_in_time_and_a_mended_one_works(lane: str) -> None:
    with veth() as cable, pair(cable, lane) as (src, dst):
        moved(src, dst, lane)
        plug(cable, False)
        began = time.monotonic()
        with pytest.raises(MigrateError):
            dst.ask("fetch", "src", [1], [1], 3.0)
        # The deadline, and the grace that a piece under way is given.
        assert time.monotonic() - began < 3.0 + 10.0
        plug(cable, True)
        end = time.monotonic() + 60
        while True:
            dst.ask("refill", 5)
            try:
                moved(src, dst, lane, 10.0)
                break
            except MigrateError:
                assert time.monotonic() < end, "the mended cable is not used again"
        assert dst.ask("unsafe") == []


@pytest.mark.parametrize(("delay_s", "loss", "times"), [(0.02, 0.01, 20), (0.2, 0.0, 5), (0.2, 0.05, 5)])
@pytest.mark.parametrize("lane", LANES)
def test_delay_and_loss_cost_time_and_nothing_else(lane: str, delay_s: float, loss: float, times: int) -> None:
    with slow_cable(delay_s, loss) as cable, pair(cable, lane) as (src, dst):
        for seed in range(5, 5 + times):
            dst.ask("refill", seed)
            moved(src, dst, lane, 90.0)
        assert cable.passed > 5 * times and (not loss or cable.lost)


@pytest.mark.parametrize("lane", LANES)
def test_a_cable_that_loses_everything_for_a_while_is_survived(lane: str) -> None:
    with slow_cable(delay_s=0.002, loss=0.0) as cable, pair(cable, lane) as (src, dst):
        moved(src, dst, lane)
        cable.cut = True
        with pytest.raises(MigrateError):
            dst.ask("fetch", "src", [1], [1], 2.0)
        cable.cut = False
        dst.ask("refill", 5)
        for attempt in range(6):
            try:
                moved(src, dst, lane, 10.0)
                break
            except MigrateError:
                assert attempt < 5
