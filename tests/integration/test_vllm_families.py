# SPDX-License-Identifier: Apache-2.0
"""Families of models with other KV caches than Llama: moved answers equal those of unmoved requests."""

from __future__ import annotations

import asyncio

import pytest

from components.engine.groups import tables_of
from tests.integration.families import FAMILIES, SAMPLINGS, compare, wrong
from tests.integration.moves import Client, nothing_left, pair, request_of, take_until
from tests.integration.vllm_engines import Pair

__all__ = ["nothing_left", "pair"]
pytestmark = pytest.mark.integration

SLOW = {"paddleocr-vl"}
"""``test_vllm_images`` has the same model."""
HELD: dict[str, list[set[int]]] = {"gemma3": [{2, 3}] * 5, "gpt-oss": [{2, 3}], "qwen3-next": [{1}] * 3}
"""Blocks of the groups that do not keep everything: a window of 64 tokens is in two or three of 32, a state in one."""


def with_each(caching: bool = True) -> pytest.MarkDecorator:
    parameters = [
        pytest.param(more | {"enable_prefix_caching": caching}, id=name, marks=[pytest.mark.slow] * (name in SLOW))
        for name, more in FAMILIES.items()
    ]
    return pytest.mark.parametrize("pair", parameters, indirect=True)


def family_of(request: pytest.FixtureRequest) -> str:
    return next(name for name in FAMILIES if name in request.node.callspec.id)


@with_each()
@pytest.mark.parametrize("requests", [6, pytest.param(34, marks=pytest.mark.slow)])
def test_moved_answers_equal_unmoved_ones(
    runner: asyncio.Runner, pair: Pair, requests: int, request: pytest.FixtureRequest
) -> None:
    """Prefilled where they are decoded and elsewhere, in each mode."""
    cells = runner.run(asyncio.wait_for(compare(pair, family_of(request), requests), 30 + 20 * requests))
    assert not list(wrong(cells))
    for engine in (pair.a, pair.b):
        assert not runner.run(engine.report())[0].kv_refused


@pytest.mark.slow
@with_each(caching=False)
def test_moved_answers_equal_unmoved_ones_without_a_prefix_cache(
    runner: asyncio.Runner, pair: Pair, request: pytest.FixtureRequest
) -> None:
    assert not list(wrong(runner.run(asyncio.wait_for(compare(pair, family_of(request), 34), 710))))


@with_each()
def test_vllm_keeps_its_hybrid_cache_manager_and_windows_move_what_they_hold(
    runner: asyncio.Runner, pair: Pair, request: pytest.FixtureRequest
) -> None:
    async def scenario() -> None:
        long = request_of("long", 700, SAMPLINGS["greedy"])
        stream = pair.a.generate(long)
        await take_until(stream, Client(), 5)
        frozen = await pair.a.freeze(long.request_id)
        await pair.a.abort(long.request_id)
        assert not pair.a.llm.vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
        *held, full = sorted(len(table.ids) for table in tables_of(frozen.offer))
        assert full == -(-frozen.offer.num_tokens // frozen.offer.block_size)
        wanted = HELD.get(family_of(request), [])
        assert len(held) == len(wanted) and all(count in counts for count, counts in zip(held, wanted, strict=True))

    runner.run(asyncio.wait_for(scenario(), 60))
