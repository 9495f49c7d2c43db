# SPDX-License-Identifier: Apache-2.0
"""Read-only views of the paged engine: load, and block accounting."""

from __future__ import annotations

from collections import Counter

from components.engine.paged.scheduler import WAITING, Scheduler
from components.engine.protocol import EngineStats, RequestPhase
from components.errors import SessionError


def stats(scheduler: Scheduler, step_s: float) -> EngineStats:
    """Load at this moment; ``step_s`` is the duration of the last step."""
    requests = scheduler.requests.values()
    phases = Counter(active.phase for active in requests)
    queued = [active for active in requests if active.phase in WAITING]
    return EngineStats(
        running=phases[RequestPhase.PREFILL] + phases[RequestPhase.DECODE],
        waiting=len(queued),
        frozen=phases[RequestPhase.FROZEN],
        landing=phases[RequestPhase.LANDING],
        free_blocks=scheduler.pool.free,
        total_blocks=scheduler.pool.total,
        decode_kv_tokens=sum(active.computed for active in requests if active.phase is RequestPhase.DECODE),
        queued_prefill_tokens=sum(len(active.tokens) for active in queued),
        scheduled_prefill_tokens=scheduler.scheduled_prefill_tokens,
        preemptions_total=scheduler.preemptions_total,
        step_s=step_s,
    )


def verify(scheduler: Scheduler, flying: Counter[int]) -> None:
    """Raise ``SessionError`` unless blocks and requests add up. ``flying``: blocks held by copies."""
    expected = Counter(flying)
    for active in scheduler.requests.values():
        expected.update(active.blocks)
        if active.ended or active.computed > len(active.blocks) * scheduler.block_size:
            raise SessionError(f"request {active.request_id} has ended or claims more KV than it has blocks")
        if active.blocks and active.phase in WAITING:
            raise SessionError(f"request {active.request_id} holds blocks while {active.phase}")
    scheduler.pool.verify(expected)
