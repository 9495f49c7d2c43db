# SPDX-License-Identifier: Apache-2.0
"""A short run of ``tests.fuzz``, its corpus, and inputs that are large, deep or no UTF-8."""

from __future__ import annotations

import logging
import tracemalloc

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz.__main__ import ALL
from tests.fuzz.inputs import Target, huge, inputs

BOUND = 512 << 20
SLOW = ("worker", "router")
by_name = pytest.mark.parametrize("target", ALL, ids=lambda target: target.name)


@pytest.fixture(autouse=True)
def quiet() -> object:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@by_name
def test_valid_inputs_and_former_failures(target: Target) -> None:
    assert len(target.corpus()) > 1
    for data in target.corpus():
        target.feed(data)


@by_name
def test_anything_is_taken_or_refused(target: Target) -> None:
    @settings(
        max_examples=10 if target.name in SLOW else 100,
        deadline=None,
        database=None,
        derandomize=True,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs(target))
    def run(data: bytes) -> None:
        target.feed(data)

    run()


@by_name
@pytest.mark.parametrize("name", list(huge()))
def test_large_deep_and_foreign_inputs_stay_within_bounds(target: Target, name: str) -> None:
    data = huge()[name]
    tracemalloc.start()
    try:
        target.feed(data)
        assert tracemalloc.get_traced_memory()[1] < BOUND
    finally:
        tracemalloc.stop()
