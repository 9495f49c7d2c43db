# SPDX-License-Identifier: Apache-2.0
"""Copies between host addresses: all requested bytes and no other, through the caches and bypassing them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.transfer.data.hostcopy import HostCopier

BYTES = 1 << 20
PIECES = 8


@pytest.fixture(scope="module")
def copier() -> Iterator[HostCopier]:
    made = HostCopier(2)
    yield made
    made.close()


@settings(max_examples=60, deadline=None)
@given(
    places=st.lists(st.integers(0, BYTES // PIECES - 1), min_size=2 * PIECES, max_size=2 * PIECES),
    sizes=st.lists(st.integers(0, BYTES // PIECES), min_size=PIECES, max_size=PIECES),
    lines=st.booleans(),
    around=st.booleans(),
)
def test_what_is_asked_for_arrives_and_nothing_else_changes(
    copier: HostCopier, places: list[int], sizes: list[int], lines: bool, around: bool
) -> None:
    """``lines``: places and sizes are whole cache lines, as those of KV blocks mostly are."""
    source = np.random.default_rng(1).integers(0, 256, BYTES, np.uint8)
    room = np.zeros(BYTES + 64, np.uint8)
    target = room[-room.ctypes.data % 64 :][:BYTES]
    unit, share = (64 if lines else 1), BYTES // PIECES
    to, origin, length = [], [], []
    for n, size in enumerate(sizes):
        begin = places[n] // unit * unit
        size = min(size, share - begin, BYTES - places[PIECES + n]) // unit * unit
        to.append(n * share + begin)
        origin.append(places[PIECES + n])
        length.append(size)
    expected = target.copy()
    for a, b, size in zip(to, origin, length, strict=True):
        expected[a : a + size] = source[b : b + size]
    columns = np.array(to) + target.ctypes.data, np.array(origin) + source.ctypes.data, np.array(length)
    copier.submit(*columns, around=around).result(10)
    assert np.array_equal(target, expected)
