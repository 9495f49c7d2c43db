# SPDX-License-Identifier: Apache-2.0
"""The destination's half of the scheduler: reserving blocks, rounds of copying, the commit.

A request with tokens that were generated elsewhere enters as vLLM's own *preempted* kind. With a landing it is held in
WAITING_FOR_REMOTE_KVS, vLLM's state for requests whose KV is on the way, until the commit. A failed or unproven copy
truncates its computed tokens, and vLLM recomputes the rest.

State and threading are those of ``scheduler.MigrationMixin``, of which this is a part. Raises ``NoRoom`` and
``SessionError``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from vllm.v1.request import RequestStatus

from components.engine.protocol import Frozen, KVOffer, LandingStatus, RequestId
from components.engine.vllm.records import Job, JobResult, Landing, Record
from components.errors import NoRoom, SessionError


class LandingMixin:
    """See the module docstring."""

    records: dict[RequestId, Record]
    _by_vllm_id: dict[str, Record]
    _new_jobs: list[Job]
    _flying: dict[int, tuple[Job, list[JobResult]]]
    _job_ids: Iterator[int]
    _rng_resets: dict[str, bytes]
    kv_refused: Counter[str]
    _bytes_per_block: int
    _wait_bytes: int
    _deadline_s: float

    def external_tokens(self, request: Any, num_local_tokens: int) -> tuple[int | None, bool]:
        """vLLM asks how many tokens will come from elsewhere: (None, False) holds the request."""
        record = self._by_vllm_id.get(request.request_id)
        if record is None or record.landing is None:
            return 0, False
        landing = record.landing
        landing.local_blocks = num_local_tokens // self.block_size
        if landing.commit is None:
            whole = min(landing.offer.num_tokens, request.num_tokens - 1) // self.block_size * self.block_size
            landing.held = whole <= num_local_tokens
            return (None, False) if landing.held else (whole - num_local_tokens, True)
        missing = min(landing.commit.offer.num_tokens, request.num_tokens - 1) - num_local_tokens
        if missing <= 0:
            record.landing = None
            return 0, False
        return missing, not self._can_wait(-(-missing // self.block_size))

    def blocks_allocated(self, request: Any, block_ids: list[int]) -> None:
        """vLLM has reserved the blocks that ``external_tokens`` asked for."""
        record = self._by_vllm_id.get(request.request_id)
        if record is None or record.landing is None:
            return
        landing = record.landing
        landing.block_ids = list(block_ids)
        landing.landed_blocks = landing.requested_blocks = landing.local_blocks
        if landing.commit is not None:
            missing = -(-landing.commit.offer.num_tokens // self.block_size) - landing.local_blocks
            self._copy_tail(record, wait=self._can_wait(missing))
        else:
            self._request_copy(record, landing.offer.num_tokens // self.block_size, wait=False)

    def _can_wait(self, blocks: int) -> bool:
        # A small tail is worth holding the step for: it saves waiting for the next one.
        return blocks * self._bytes_per_block <= self._wait_bytes

    def _landing_status(self, record: Record) -> LandingStatus:
        landing = record.landing
        if landing is None:
            return record.landed or LandingStatus(reserved=True)
        reserved = landing.held or record.request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
        if not reserved and not self._has_room(record):
            raise NoRoom(
                f"{self.kv_cache_manager.block_pool.get_num_free_blocks()} free KV blocks and "
                f"{len(self.running)} of {self.max_num_running_reqs} request slots in use"
            )
        return self._progress_of(landing, reserved)

    def _progress_of(self, landing: Landing, reserved: bool) -> LandingStatus:
        return LandingStatus(
            reserved=reserved,
            landed_tokens=max(landing.landed_blocks, landing.local_blocks) * self.block_size,
            landed_generation=landing.offer.generation,
            in_flight=landing.job is not None or not reserved,
            rounds=landing.rounds,
            bytes=landing.bytes,
            descriptors=landing.descriptors,
            post_s=landing.post_s,
            wire_s=landing.wire_s,
            lane=landing.lane,
            error=landing.error,
        )

    def _has_room(self, record: Record) -> bool:
        needed = -(-record.request.num_tokens // self.block_size) + 1
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        return bool(free >= needed and len(self.running) < self.max_num_running_reqs)

    def _extend(self, record: Record, offer: KVOffer, tokens: tuple[int, ...]) -> None:
        landing = self._landing(record)
        if landing.job is not None:
            raise SessionError("the previous round is still being copied")
        self._append_tokens(record, tokens)
        whole = offer.num_tokens // self.block_size
        if not landing.block_ids:
            landing.offer = offer
            return
        self._grow(record, whole * self.block_size)
        self._adopt(landing, offer)
        self._request_copy(record, whole, wait=False)

    def _commit(self, record: Record, frozen: Frozen) -> None:
        landing = self._landing(record)
        if landing.commit is not None:
            return
        if not landing.block_ids and not self._has_room(record):
            raise NoRoom(f"{self.kv_cache_manager.block_pool.get_num_free_blocks()} free KV blocks")
        if landing.block_ids:
            self._grow(record, frozen.offer.num_tokens)
        self._append_tokens(record, frozen.output_token_ids)
        record.rng_state = frozen.rng_state
        landing.commit = frozen
        if landing.block_ids and frozen.offer.num_tokens <= landing.local_blocks * self.block_size:
            # The source lost its blocks (preempted): nothing of it can be used any more.
            self._recompute_from(record, 0)
        elif landing.job is None:
            self._adopt(landing, frozen.offer)
            if landing.block_ids:
                missing = -(-frozen.offer.num_tokens // self.block_size) - landing.landed_blocks
                self._copy_tail(record, wait=self._can_wait(missing))

    def expects_commit(self, request_id: RequestId) -> bool:
        """True while a request has landed here and waits for its commit."""
        record = self.records.get(request_id)
        return record is not None and record.landing is not None and record.landing.commit is None

    def _landing(self, record: Record) -> Landing:
        if record.landing is None:
            raise SessionError(f"request {record.request_id} is not landing")
        return record.landing

    def _append_tokens(self, record: Record, tokens: tuple[int, ...]) -> None:
        request = record.request
        have = request.num_output_tokens
        if tuple(request.output_token_ids) != tokens[:have]:
            raise SessionError("the source's tokens differ from those this request started with")
        if len(tokens) > have:
            request.append_output_token_ids(list(tokens[have:]))
            record.needs_install = True
            if request.status == RequestStatus.WAITING:
                request.status = RequestStatus.PREEMPTED
            request.num_preemptions = max(1, request.num_preemptions)
            request.prefill_stats = None

    def _grow(self, record: Record, num_tokens: int) -> None:
        request = record.request
        extra = num_tokens - request.num_computed_tokens
        if extra <= 0:
            return
        if self.kv_cache_manager.allocate_slots(request, extra, delay_cache_blocks=True) is None:
            raise NoRoom(f"{extra} more tokens do not fit")
        request.num_computed_tokens = num_tokens
        landing = self._landing(record)
        landing.block_ids = list(self.kv_cache_manager.get_block_ids(request.request_id)[0])

    def _adopt(self, landing: Landing, offer: KVOffer) -> None:
        """Take a newer offer. Blocks copied from another place than it names prove nothing."""
        copied = slice(landing.local_blocks, landing.landed_blocks)
        moved = offer.block_ids[copied] != landing.offer.block_ids[copied]
        if offer.generation != landing.offer.generation or offer.agents != landing.offer.agents or moved:
            landing.landed_blocks = landing.local_blocks
        landing.requested_blocks = landing.landed_blocks
        landing.offer = offer

    def _copy_tail(self, record: Record, wait: bool) -> None:
        landing = self._landing(record)
        total = landing.offer.num_tokens
        record.request.num_computed_tokens = total
        self._request_copy(record, -(-total // self.block_size), wait=wait)
        if wait and record.request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
            self.finished_recving_kv_req_ids.add(record.request.request_id)

    def _request_copy(self, record: Record, upto_block: int, wait: bool) -> None:
        landing = self._landing(record)
        first = landing.requested_blocks
        job = Job(
            job_id=next(self._job_ids),
            request_id=record.request_id,
            vllm_id=record.request.request_id,
            agents=landing.offer.agents,
            src_blocks=tuple(landing.offer.block_ids[first:upto_block]),
            dst_blocks=tuple(landing.block_ids[first:upto_block]),
            checks=self._checks(landing),
            vouched=self._vouched(landing),
            wait=wait,
            deadline_s=self._deadline_s,
        )
        landing.job = job
        landing.requested_blocks = max(first, upto_block)
        landing.rounds += 1
        self._flying[job.job_id] = (job, [])
        self._new_jobs.append(job)

    def _checks(self, landing: Landing) -> tuple[tuple[int, tuple[int, ...]], ...]:
        if landing.commit is None or not landing.commit.checksums:
            return ()
        ranks = len(landing.offer.agents)
        sums = landing.commit.checksums
        count = len(sums) // ranks
        total = len(landing.offer.block_ids)
        return tuple(
            (landing.block_ids[total - count + i], tuple(sums[rank * count + i] for rank in range(ranks)))
            for i in range(count)
            # What our own prefix cache had was computed here, perhaps with other rounding.
            if total - count + i >= landing.local_blocks
        )

    def _vouched(self, landing: Landing) -> tuple[int, ...]:
        if landing.commit is None or not landing.commit.checksums:
            return ()
        count = len(landing.commit.checksums) // len(landing.offer.agents)
        return tuple(landing.block_ids[landing.local_blocks : len(landing.offer.block_ids) - count])

    def job_results(self, results: list[JobResult]) -> None:
        """Called at the end of a step with what the workers' jobs came to."""
        for result in results:
            job, seen = self._flying[result.job_id]
            seen.append(result)
            if len(seen) == len(job.agents):
                del self._flying[result.job_id]
                self._settle(job, seen)

    def _settle(self, job: Job, seen: list[JobResult]) -> None:
        record = self._by_vllm_id.get(job.vllm_id)
        if record is None or record.landing is None or record.landing.job is not job:
            request = self.requests.get(job.vllm_id)
            if request is not None and request.is_finished():
                self._free_blocks(request)
            return
        landing = record.landing
        landing.job = None
        landing.bytes += sum(r.bytes for r in seen)
        landing.descriptors += sum(r.descriptors for r in seen)
        landing.post_s += max(r.post_s for r in seen)
        landing.wire_s += max(r.wire_s for r in seen)
        landing.lane = seen[0].lane or landing.lane
        failed = next((r for r in seen if not r.ok), None)
        if failed is None:
            landing.landed_blocks = landing.requested_blocks
        else:
            bad = {block for r in seen for block in r.bad_blocks}
            good = next((i for i, b in enumerate(landing.block_ids) if b in bad), landing.landed_blocks)
            landing.landed_blocks = landing.requested_blocks = min(good, landing.landed_blocks)
            landing.error = failed.error
            if failed.error is not None:
                self.kv_refused[failed.error[0]] += 1
        if landing.commit is not None:
            self._settle_commit(record, job, failed is not None)

    def _settle_commit(self, record: Record, job: Job, failed: bool) -> None:
        landing = self._landing(record)
        request = record.request
        if landing.commit is not None and landing.offer is not landing.commit.offer:
            # This was a pre-copy round that the commit overtook: now the tail.
            self._adopt(landing, landing.commit.offer)
            self._copy_tail(record, wait=False)
            return
        record.landed = self._progress_of(landing, reserved=True)
        record.landing = None
        if not failed:
            if not job.wait:
                self.finished_recving_kv_req_ids.add(request.request_id)
            return
        good_tokens = landing.landed_blocks * self.block_size
        if job.wait and request.status == RequestStatus.RUNNING:
            # vLLM has already turned the request back; its generator has drawn for a dropped token.
            if record.rng_state:
                self._rng_resets[request.request_id] = record.rng_state
            return
        self._recompute_from(record, good_tokens)

    def _recompute_from(self, record: Record, good_tokens: int) -> None:
        """Let vLLM compute everything after the first ``good_tokens`` itself."""
        request = record.request
        if record.landing is not None and record.landing.job is None:
            record.landing = None
        request.num_computed_tokens = good_tokens
        if request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
            self.failed_recving_kv_req_ids.add(request.request_id)
            self.finished_recving_kv_req_ids.add(request.request_id)
