# SPDX-License-Identifier: Apache-2.0
"""How many copies a worker begins at a time."""

from __future__ import annotations

import asyncio

import pytest

from components.migration import pace
from components.migration.pace import Pace
from tests.faults import clock

SIZE = 1000


class Copies:
    """Copies on a lane that carries ``rate`` bytes a second, all at once."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.pace = Pace()
        self.now = self.most = 0

    async def copy(self, size: int = SIZE, fails: bool = False) -> None:
        async with self.pace.room(size):
            self.now += size
            self.most = max(self.most, self.now)
            await asyncio.sleep(self.now / self.rate)
            self.now -= size
            if fails:
                raise ValueError("failed")


@pytest.fixture(autouse=True)
def few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "_FIRST_BYTES", 4 * SIZE)


def test_a_slow_lane_gets_a_few_at_a_time() -> None:
    async def run() -> Copies:
        copies = Copies(rate=SIZE / 10)
        await asyncio.gather(*(copies.copy() for _ in range(20)))
        return copies

    assert clock.run(run()).most == 4 * SIZE


def test_a_fast_lane_soon_gets_all() -> None:
    async def run() -> Copies:
        copies = Copies(rate=SIZE * 1000)
        await asyncio.gather(*(copies.copy() for _ in range(4)))
        await asyncio.gather(*(copies.copy() for _ in range(100)))
        return copies

    assert clock.run(run()).most == 100 * SIZE


def test_one_that_is_larger_goes_alone() -> None:
    async def run() -> Copies:
        copies = Copies(rate=SIZE / 10)
        await asyncio.gather(copies.copy(), copies.copy(9 * SIZE), copies.copy())
        return copies

    assert clock.run(run()).most == 9 * SIZE


def test_failed_copies_make_room_and_no_rate() -> None:
    async def run() -> Copies:
        copies = Copies(rate=SIZE * 1000)
        ended = await asyncio.gather(*(copies.copy(fails=True) for _ in range(9)), return_exceptions=True)
        assert all(isinstance(error, ValueError) for error in ended)
        return copies

    copies = clock.run(run())
    assert copies.most == 4 * SIZE and copies.pace.bound == 4 * SIZE
