# SPDX-License-Identifier: Apache-2.0
"""Read-only views of the engine: the per-request table, load, and block accounting."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING

from vllm.v1.request import RequestStatus

from components.engine.protocol import EngineStats, RequestInfo, RequestPhase
from components.engine.vllm.records import Record
from components.errors import SessionError

if TYPE_CHECKING:
    from components.engine.vllm.migration import Migration


def phase_of(record: Record) -> RequestPhase:
    """The protocol's phase of a request."""
    request = record.request
    if record.leaving is not None:
        return RequestPhase.FROZEN
    if record.incoming is not None:
        return RequestPhase.LANDING
    if request.status == RequestStatus.RUNNING:
        return RequestPhase.PREFILL if request.is_prefill_chunk else RequestPhase.DECODE
    if request.status == RequestStatus.PREEMPTED:
        return RequestPhase.PREEMPTED
    return RequestPhase.WAITING


def request_table(migration: Migration) -> tuple[RequestInfo, ...]:
    """One row for each request."""
    now = time.monotonic()
    return tuple(
        RequestInfo(
            request_id=record.request_id,
            phase=phase_of(record),
            prompt_tokens=record.request.num_prompt_tokens,
            output_tokens=record.request.num_output_tokens,
            kv_blocks=migration.port.num_blocks_of(record.request),
            age_s=now - record.born,
            priority=record.request.priority,
            max_tokens=record.request.max_tokens,
            preemptions=record.request.num_preemptions,
            not_migratable=migration.outgoing.why_not(record),
        )
        for record in migration.records
    )


def stats_of(migration: Migration) -> EngineStats:
    """Load at this moment."""
    records, port = migration.records, migration.port
    phases = Counter(map(phase_of, records))
    decoding = [r for r in port.running if not r.is_prefill_chunk]
    prefilling = [r for r in port.running if r.is_prefill_chunk]
    queued = [r.request for r in records if phase_of(r) in (RequestPhase.WAITING, RequestPhase.PREEMPTED)]
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
        preemptions_total=migration.preemptions_total,
        kv_refused=dict(migration.incoming.copies.refused),
        step_s=migration.last_step_s,
    )


def verify_blocks(migration: Migration) -> None:
    """Raise ``SessionError`` unless the holders of every used block are its requests and copies."""
    expected = Counter(block.block_id for block in migration.port.holders())
    expected.update(block.block_id for block in migration.incoming.copies.kept_blocks())
    expected.update(block.block_id for block in migration.handoff.lent_blocks())
    for block in migration.port.pool():
        if block.ref_cnt != expected[block.block_id]:
            known = expected[block.block_id]
            raise SessionError(f"block {block.block_id} is held {block.ref_cnt} times, {known} of them accounted for")
    unknown = [r.request_id for r in migration.records if migration.port.request(r.request.request_id) is None]
    if unknown:
        raise SessionError(f"records of ended requests are left: {unknown}")
