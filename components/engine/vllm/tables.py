# SPDX-License-Identifier: Apache-2.0
"""Read-only views of the scheduler: the per-request table, load, and block accounting."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from vllm.v1.request import RequestStatus

from components.engine.protocol import EngineStats, RequestInfo, RequestPhase
from components.engine.vllm.records import Record
from components.errors import SessionError


def phase_of(record: Record) -> RequestPhase:
    """Where a request is, in the protocol's words."""
    request = record.request
    if record.frozen is not None or record.freezing:
        return RequestPhase.FROZEN
    if record.landing is not None:
        return RequestPhase.LANDING
    if request.status == RequestStatus.RUNNING:
        return RequestPhase.PREFILL if request.is_prefill_chunk else RequestPhase.DECODE
    if request.status == RequestStatus.PREEMPTED:
        return RequestPhase.PREEMPTED
    return RequestPhase.WAITING


def _blocks(scheduler: Any, request: Any) -> list[int]:
    return list(scheduler.kv_cache_manager.get_block_ids(request.request_id)[0])


def request_table(scheduler: Any) -> tuple[RequestInfo, ...]:
    """One row for each request that came through the protocol."""
    now = time.monotonic()
    return tuple(
        RequestInfo(
            request_id=record.request_id,
            phase=phase_of(record),
            prompt_tokens=record.request.num_prompt_tokens,
            output_tokens=record.request.num_output_tokens,
            kv_blocks=len(_blocks(scheduler, record.request)),
            age_s=now - record.born,
            priority=record.request.priority,
            max_tokens=record.request.max_tokens,
            preemptions=record.request.num_preemptions,
            not_migratable=record.marker.not_migratable,
        )
        for record in scheduler.records.values()
    )


def stats_of(scheduler: Any) -> EngineStats:
    """Load at this moment."""
    phases = Counter(phase_of(record) for record in scheduler.records.values())
    decoding = [r for r in scheduler.running if not r.is_prefill_chunk]
    prefilling = [r for r in scheduler.running if r.is_prefill_chunk]
    queued = [
        r.request for r in scheduler.records.values() if phase_of(r) in (RequestPhase.WAITING, RequestPhase.PREEMPTED)
    ]
    pool = scheduler.kv_cache_manager.block_pool
    return EngineStats(
        running=len(scheduler.running),
        waiting=len(queued),
        frozen=phases[RequestPhase.FROZEN],
        landing=phases[RequestPhase.LANDING],
        free_blocks=pool.get_num_free_blocks(),
        # One block is vLLM's null block and never given to a request.
        total_blocks=scheduler.kv_cache_config.num_blocks - 1,
        decode_kv_tokens=sum(r.num_computed_tokens for r in decoding),
        queued_prefill_tokens=sum(r.num_tokens for r in queued),
        scheduled_prefill_tokens=sum(r.num_tokens - r.num_computed_tokens for r in prefilling),
        preemptions_total=scheduler.preemptions_total,
        kv_refused=dict(scheduler.kv_refused),
        step_s=scheduler.last_step_s,
    )


def verify_blocks(scheduler: Any) -> None:
    """Raise ``SessionError`` unless every used block belongs to a request, as often as it is used."""
    manager = scheduler.kv_cache_manager
    expected: Counter[int] = Counter()
    for request in scheduler.requests.values():
        expected.update(_blocks(scheduler, request))
    null_id = manager.block_pool.null_block.block_id
    for block in manager.block_pool.blocks:
        if block.block_id != null_id and block.ref_cnt != expected[block.block_id]:
            raise SessionError(
                f"block {block.block_id} is held {block.ref_cnt} times, requests account for {expected[block.block_id]}"
            )
    unknown = [r.request_id for r in scheduler.records.values() if r.request.request_id not in scheduler.requests]
    if unknown:
        raise SessionError(f"records of ended requests are left: {unknown}")
