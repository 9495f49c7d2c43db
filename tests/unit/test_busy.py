# SPDX-License-Identifier: Apache-2.0
"""A worker's look at its engine from outside."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from components.worker.busy import computes


async def _within(looks: int, wanted: bool) -> bool:
    for _ in range(looks):
        if await computes(0.2) is wanted:
            return True
    return False


@pytest.mark.asyncio
async def test_a_child_at_work_computes_and_a_stopped_one_does_not() -> None:
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        assert await _within(50, True)
        psutil.Process(child.pid).suspend()
        assert await _within(2, False)
    finally:
        child.kill()
        child.wait()
