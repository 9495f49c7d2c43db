# SPDX-License-Identifier: Apache-2.0
"""Does the engine compute? Seen from beside it, for the time in which it answers nobody.

An engine core answers between two steps. A step of a long prompt can take minutes on a CPU, and then a core at work
looks like one that is stopped; its use of the processor tells them apart.
"""

from __future__ import annotations

import asyncio

import psutil

_LOOK_S = 0.5
_SHARE = 0.2
"""Of one core. The threads of a transfer agent alone, beside a core that stands still, use less."""


async def computes(look_s: float = _LOOK_S) -> bool:
    """Have this process's children, the engine core among them, used the processor during the next ``look_s``?"""
    before = _used_s()
    await asyncio.sleep(look_s)
    after = _used_s()
    return sum(used - before[pid] for pid, used in after.items() if pid in before) > _SHARE * look_s


def _used_s() -> dict[int, float]:
    used = {}
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.Error:
            continue
        used[child.pid] = times.user + times.system
    return used
