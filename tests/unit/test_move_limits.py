# SPDX-License-Identifier: Apache-2.0
"""Migrations at once: never more than the limits allow, and none waits for ever."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.router.limits import MoveLimits

moves = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)).filter(lambda pair: pair[0] != pair[1]), max_size=24)


@given(moves, st.integers(1, 4), st.integers(1, 4))
def test_no_worker_and_no_pair_has_more_than_its_limit_and_all_get_through(
    wanted: list[tuple[int, int]], per_worker: int, per_pair: int
) -> None:
    async def run() -> None:
        limits = MoveLimits(per_worker, per_pair)
        running: list[tuple[int, int]] = []
        done = 0

        async def move(source: int, target: int) -> None:
            nonlocal done
            async with limits.slot(source, target):
                running.append((source, target))
                workers = Counter(worker for pair in running for worker in pair)
                pairs = Counter(frozenset(pair) for pair in running)
                assert max(workers.values()) <= per_worker and max(pairs.values()) <= per_pair
                await asyncio.sleep(0)
                running.remove((source, target))
                done += 1

        await asyncio.wait_for(asyncio.gather(*(move(*pair) for pair in wanted)), 5)
        assert done == len(wanted)

    asyncio.run(run())


def test_other_pairs_do_not_wait_and_a_failed_move_gives_its_place_back() -> None:
    async def run() -> None:
        limits = MoveLimits(per_worker=2, per_pair=1)
        async with limits.slot(1, 2):
            async with asyncio.timeout(1), limits.slot(1, 3):
                pass
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01), limits.slot(2, 1):
                    pass
        with pytest.raises(ValueError, match="lost"):
            async with limits.slot(1, 2):
                raise ValueError("lost")
        async with asyncio.timeout(1), limits.slot(1, 2):
            pass

    asyncio.run(run())
