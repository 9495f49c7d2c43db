# SPDX-License-Identifier: Apache-2.0
"""What Dynamo gets when it iterates over a response, in whatever order chunks and questions come."""

from __future__ import annotations

import asyncio
import gc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from components.router.answer import Answer


async def chunks(answer: Answer) -> list[dict[str, Any]]:
    return [chunk async for chunk in answer]


async def test_chunks_come_in_order_before_and_after_they_are_asked_for() -> None:
    answer = Answer(asyncio.get_running_loop())
    answer.put({"n": 0})
    reading = asyncio.ensure_future(chunks(answer))
    await asyncio.sleep(0)
    for n in (1, 2):
        answer.put({"n": n})
        await asyncio.sleep(0)
    answer.end()
    answer.put({"n": 3})
    assert await reading == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert await chunks(answer) == []


async def test_what_is_asked_for_is_a_future_on_any_thread() -> None:
    answer = Answer(asyncio.get_running_loop())
    with ThreadPoolExecutor(1) as dynamo:
        asked = await asyncio.wrap_future(dynamo.submit(answer.__anext__))
    assert asyncio.ensure_future(asked) is asked
    answer.put({"n": 0})
    assert await asked == {"n": 0}


async def test_an_error_comes_after_what_was_there_before() -> None:
    answer = Answer(asyncio.get_running_loop())
    answer.put({"n": 0})
    answer.end(ValueError("no"))
    assert await answer.__anext__() == {"n": 0}
    with pytest.raises(ValueError, match="no"):
        await answer.__anext__()


async def test_a_reader_that_has_gone_disturbs_nobody(caplog: pytest.LogCaptureFixture) -> None:
    answer = Answer(asyncio.get_running_loop())
    reading = asyncio.ensure_future(chunks(answer))
    await asyncio.sleep(0)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    answer.put({"n": 0})
    answer.end(ValueError("no"))
    del answer, reading
    gc.collect()
    await asyncio.sleep(0)
    assert not caplog.records
