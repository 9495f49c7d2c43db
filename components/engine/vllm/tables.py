# SPDX-License-Identifier: Apache-2.0
"""Read-only views of the engine: the per-request table, load, and block accounting."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable

from vllm.v1.core.kv_cache_utils import KVCacheBlock

from components.engine.protocol import EngineStats, RequestInfo, RequestPhase
from components.engine.vllm.compat.scheduler import SchedulerPort
from components.engine.vllm.records import Record
from components.errors import SessionError


def request_table(
    port: SchedulerPort, records: Collection[Record], why_not: Callable[[Record], str | None]
) -> tuple[RequestInfo, ...]:
    """One row for each request; ``why_not`` says why it cannot move."""
    now = time.monotonic()
    return tuple(
        RequestInfo(
            request_id=record.request_id,
            phase=record.phase,
            prompt_tokens=record.request.num_prompt_tokens,
            output_tokens=record.request.num_output_tokens,
            kv_blocks=port.num_blocks_of(record.request),
            age_s=now - record.born,
            priority=record.request.priority,
            max_tokens=record.request.max_tokens,
            preemptions=record.request.num_preemptions,
            not_migratable=why_not(record),
        )
        for record in records
    )


def stats_of(port: SchedulerPort, records: Collection[Record]) -> EngineStats:
    """Load at this moment, without the counters of ``Migration``."""
    phases = Counter(record.phase for record in records)
    decoding = [r for r in port.running if not r.is_prefill_chunk]
    prefilling = [r for r in port.running if r.is_prefill_chunk]
    queued = [r.request for r in records if r.phase in (RequestPhase.WAITING, RequestPhase.PREEMPTED)]
    return EngineStats(
        running=len(port.running),
        waiting=len(queued),
        frozen=phases[RequestPhase.FROZEN],
        landing=phases[RequestPhase.LANDING],
        free_blocks=port.free_blocks,
        # One block is vLLM's null block, which no request gets.
        total_blocks=port.num_blocks - 1,
        decode_kv_tokens=sum(r.num_computed_tokens for r in decoding),
        queued_prefill_tokens=sum(r.num_tokens for r in queued),
        scheduled_prefill_tokens=sum(r.num_tokens - r.num_computed_tokens for r in prefilling),
    )


def verify_blocks(port: SchedulerPort, records: Collection[Record], others: Iterable[KVCacheBlock]) -> None:
    """Raise ``SessionError`` unless the holders of every used block are its requests, or those of ``others``."""
    expected = Counter(block.block_id for block in (*port.holders(), *others))
    for block in port.pool():
        if block.ref_cnt != expected[block.block_id]:
            known = expected[block.block_id]
            raise SessionError(f"block {block.block_id} is held {block.ref_cnt} times, {known} of them accounted for")
    unknown = [r.request_id for r in records if port.request(r.request.request_id) is None]
    if unknown:
        raise SessionError(f"records of ended requests are left: {unknown}")
