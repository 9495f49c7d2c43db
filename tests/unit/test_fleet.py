# SPDX-License-Identifier: Apache-2.0
"""The benchmark of many workers without engines extrapolates with measured slopes."""

from __future__ import annotations

import pytest

from benchmarks.fleet import Point, extrapolated


def point(workers: int) -> Point:
    slopes = {name: 2.0 + 3.0 * workers for name in Point.__struct_fields__[1:-1] if not name.startswith("worker_")}
    return Point(workers=workers, worker_mib=90.0, worker_ms=1.0, missing=0, **slopes)


def test_what_grows_with_the_workers_is_extrapolated_and_each_ones_share_is_not() -> None:
    found = extrapolated([point(10), point(20), point(40)], 1000)
    assert found["etcd_mib"] == pytest.approx(3002.0)
    assert found["worker_mib"] == pytest.approx(90.0)
    assert "missing" not in found
