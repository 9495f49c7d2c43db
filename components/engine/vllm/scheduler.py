# SPDX-License-Identifier: Apache-2.0
"""A vLLM scheduler whose requests can be frozen, handed over and taken in.

Life of a record
    ``add_request`` reads the marker that ``VLLMEngine`` put on the request and keeps a ``Record``;
    ``_free_request``, through which every end of a request goes, drops it.

Source
    Freezing takes the request out of ``running``: it is not scheduled, its blocks stay allocated, and the
    model runner keeps its state, as for any running request that a step leaves out. Resuming puts it back.

Destination
    See ``landing``.

Threading
    Everything runs on the engine core's thread, ``control`` between two steps.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from concurrent.futures import Future
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from components.engine.protocol import AgentRef, Frozen, KVOffer, RequestId
from components.engine.vllm import control
from components.engine.vllm.control import Call, Marker, Op, Reply
from components.engine.vllm.landing import LandingMixin
from components.engine.vllm.records import Install, Job, JobResult, Landing, Record, StepMetadata
from components.engine.vllm.tables import phase_of, request_table, stats_of, verify_blocks
from components.errors import NotMigratable, RequestNotFound, SessionError

control.install()


class MigrationMixin(LandingMixin):
    """Adds hand-over to a vLLM scheduler class. See the module docstring."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.records: dict[RequestId, Record] = {}
        self._by_vllm_id: dict[str, Record] = {}
        self._new_jobs: list[Job] = []
        self._flying: dict[int, tuple[Job, list[JobResult]]] = {}
        self._job_ids = itertools.count(1)
        self._rng_resets: dict[str, bytes] = {}
        self._auto_freeze: list[Record] = []
        self._executor: Any = None
        self._agents: tuple[AgentRef, ...] = ()
        self._step_started = 0.0
        self.last_step_s = 0.0
        self.preemptions_total = 0
        self.kv_refused: Counter[str] = Counter()
        settings = self.vllm_config.kv_transfer_config.kv_connector_extra_config["migration"]
        self._checked_blocks: int | None = {"tail": 2, "off": 0, "full": None}[settings["integrity"]]
        self._wait_bytes: int = settings["wait_bytes"]
        self._deadline_s: float = settings["copy_deadline_s"]
        self._bytes_per_block = 0
        self.connector.scheduler = self

    # Calls from VLLMEngine

    def control(self, call: Call, executor: Any) -> Reply | Future[Reply]:
        """Run one call between two steps. Raises the errors that the engine protocol names."""
        self._executor = executor
        match call.op:
            case Op.INFO:
                return self._info()
            case Op.REPORT:
                return Reply(stats=stats_of(self), requests=request_table(self))
            case Op.CHECK:
                verify_blocks(self)
                return Reply()
        record = self.records.get(call.request_id)
        if record is None:
            raise RequestNotFound(f"request {call.request_id} is not in this engine")
        match call.op:
            case Op.OFFER:
                return Reply(offer=self._offer(record, whole_blocks=True))
            case Op.FREEZE:
                return self._freeze(record)
            case Op.RESUME:
                self._resume(record)
            case Op.LANDING:
                return Reply(landing=self._landing_status(record))
            case Op.EXTEND if call.offer is not None:
                self._extend(record, call.offer, call.tokens)
            case Op.COMMIT if call.frozen is not None:
                self._commit(record, call.frozen)
            case _:
                raise SessionError(f"call {call.op} lacks its arguments")
        return Reply()

    def _info(self) -> Reply:
        ranks = self._executor.collective_rpc("dm_attach")
        self._agents = tuple(AgentRef(rank["name"], rank["epoch"]) for rank in ranks)
        per_token = sum(rank["kv_bytes_per_token"] for rank in ranks)
        self._bytes_per_block = per_token * self.block_size
        return Reply(
            agents=self._agents,
            lanes=tuple(ranks[0]["lanes"]),
            num_blocks=self.kv_cache_config.num_blocks,
            kv_bytes_per_token=per_token,
            fingerprint=ranks[0]["fingerprint"],
        )

    # Requests come and go

    def add_request(self, request: Any) -> None:
        """Take in a request; one with tokens from elsewhere continues after them."""
        params = request.kv_transfer_params or {}
        if control.MARKER in params:
            marker = control.decode_marker(params[control.MARKER])
            record = Record(marker, request, born=time.monotonic())
            record.needs_install = self._split(request, marker)
            if marker.landing is not None:
                record.landing = Landing(marker.landing)
            self.records[marker.request_id] = record
            self._by_vllm_id[request.request_id] = record
            if marker.freeze_after is not None:
                self._auto_freeze.append(record)
        super().add_request(request)

    def _split(self, request: Any, marker: Marker) -> bool:
        """Turn the prompt's end into output tokens. True when there were any."""
        tokens = request.prompt_token_ids
        generated = tokens[marker.num_prompt_tokens :]
        if not generated:
            return False
        request.prompt_token_ids = tokens[: marker.num_prompt_tokens]
        request.num_prompt_tokens = marker.num_prompt_tokens
        request._output_token_ids.extend(generated)
        # vLLM continues preempted requests with their output tokens; new ones would start over.
        request.status = RequestStatus.PREEMPTED
        request.num_preemptions = 1
        request.prefill_stats = None
        return True

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        record = self._by_vllm_id.pop(request.request_id, None)
        if record is not None:
            self.records.pop(record.request_id, None)
            if record in self._auto_freeze:
                self._auto_freeze.remove(record)
            for waiter in record.waiters:
                waiter.set_exception(RequestNotFound(f"request {record.request_id} has just finished"))
            record.waiters.clear()
        return super()._free_request(request, *args, **kwargs)

    def finish_requests(self, request_ids: Any, finished_status: RequestStatus) -> list[Any]:
        """As vLLM's; a landing request without a copy in flight gives its blocks back at once."""
        ids = [request_ids] if isinstance(request_ids, str) else request_ids
        for vllm_id in list(ids if ids is not None else self.requests):
            record = self._by_vllm_id.get(vllm_id)
            if record is None or record.landing is None or record.landing.job is not None:
                continue
            if record.request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
                self.finished_recving_kv_req_ids.add(vllm_id)
        return list(super().finish_requests(ids, finished_status))

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        self.preemptions_total += 1
        super()._preempt_request(request, *args, **kwargs)

    # Source

    def _offer(self, record: Record, whole_blocks: bool) -> KVOffer:
        request = record.request
        computed = request.num_computed_tokens - request.num_in_flight_tokens
        if record.landing is not None or request.status != RequestStatus.RUNNING:
            computed = 0
        count = computed // self.block_size
        if whole_blocks:
            computed = count * self.block_size
        elif computed % self.block_size:
            count += 1
        blocks = self.kv_cache_manager.get_block_ids(request.request_id)[0][:count] if count else []
        return KVOffer(
            request_id=record.request_id,
            agents=self._agents,
            block_size=self.block_size,
            block_ids=tuple(blocks),
            num_tokens=computed,
            generation=request.num_preemptions,
        )

    def _freeze(self, record: Record) -> Reply | Future[Reply]:
        if record.frozen is not None:
            return Reply(frozen=record.frozen)
        if record.marker.not_migratable is not None:
            raise NotMigratable(record.marker.not_migratable)
        if record.landing is not None:
            raise SessionError(f"request {record.request_id} is itself still landing here")
        if record.request.status not in (
            RequestStatus.RUNNING,
            RequestStatus.WAITING,
            RequestStatus.PREEMPTED,
        ):
            raise SessionError(f"request {record.request_id} cannot be frozen while {phase_of(record)}")
        self._take_out(record)
        if record.request.num_in_flight_tokens == 0:
            return Reply(frozen=self._complete_freeze(record))
        waiter: Future[Reply] = Future()
        record.waiters.append(waiter)
        return waiter

    def _take_out(self, record: Record) -> None:
        request = record.request
        record.freezing = True
        if request.status == RequestStatus.RUNNING:
            self.running.remove(request)
        else:
            record.frozen_from_waiting = True
            self.waiting.remove_requests([request])
            self.kv_holding_waiting.remove_requests([request])
            self.deferred_waiting.discard(request)

    def _complete_freeze(self, record: Record) -> Frozen:
        request = record.request
        offer = self._offer(record, whole_blocks=False)
        checked = offer.block_ids if self._checked_blocks is None else offer.block_ids[-self._checked_blocks :]
        if self._checked_blocks == 0:
            checked = ()
        ranks = self._executor.collective_rpc("dm_snapshot", args=(request.request_id, list(checked)))
        rng = ranks[0][0]
        if record.needs_install:
            rng = record.rng_state
        record.frozen = Frozen(
            offer=offer,
            output_token_ids=tuple(request.output_token_ids),
            rng_state=rng,
            checksums=tuple(value for _, sums in ranks for value in sums),
        )
        record.freezing = False
        for waiter in record.waiters:
            waiter.set_result(Reply(frozen=record.frozen))
        record.waiters.clear()
        return record.frozen

    def _resume(self, record: Record) -> None:
        if record.frozen is None and not record.freezing:
            return
        request = record.request
        record.frozen = None
        record.freezing = False
        for waiter in record.waiters:
            waiter.set_exception(SessionError(f"request {record.request_id} was resumed meanwhile"))
        record.waiters.clear()
        if record.frozen_from_waiting:
            record.frozen_from_waiting = False
            queue = self.kv_holding_waiting if self._holds_kv_blocks(request) else self.waiting
            queue.prepend_request(request)
        else:
            self.running.append(request)
            if len(self.running) > self.max_num_running_reqs:
                # Its place was taken meanwhile: wait in line, recomputing later, rather than overfill.
                self.running.pop()
                self._preempt_request(request, time.monotonic())

    # Steps

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's; notes when the step began."""
        self._step_started = time.monotonic()
        return super().schedule(*args, **kwargs)

    def step_metadata(self, scheduler_output: Any) -> StepMetadata:
        """What the workers must know for this step."""
        meta = StepMetadata(jobs=self._new_jobs, rng_resets=self._rng_resets)
        if any(job.wait for job in meta.jobs):
            # vLLM starts loads after the forward pass unless a step says that it reads them.
            scheduler_output.has_sync_kv_loads = True
        self._new_jobs, self._rng_resets = [], {}
        for vllm_id in scheduler_output.scheduled_cached_reqs.resumed_req_ids:
            record = self._by_vllm_id.get(vllm_id)
            if record is None or not record.needs_install:
                continue
            record.needs_install = False
            request = record.request
            meta.installs.append(
                Install(
                    vllm_id,
                    list(request.prompt_token_ids),
                    list(request.output_token_ids),
                    request.sampling_params,
                    request.lora_request,
                    record.rng_state,
                )
            )
        return meta

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """As vLLM's, then freeze what was to be frozen after this step."""
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self.last_step_s = time.monotonic() - self._step_started
        for record in self._auto_freeze:
            request = record.request
            if record.freezing or request.status != RequestStatus.RUNNING:
                continue
            if request.num_output_tokens >= (record.marker.freeze_after or 0):
                self._take_out(record)
        for record in [r for r in self.records.values() if r.freezing]:
            if record.request.num_in_flight_tokens == 0:
                frozen = self._complete_freeze(record)
                if record in self._auto_freeze:
                    self._auto_freeze.remove(record)
                    self._attach(outputs, record.request, frozen)
        return outputs

    def _attach(self, outputs: Any, request: Any, frozen: Frozen) -> None:
        for output in outputs[request.client_index].outputs:
            if output.request_id == request.request_id:
                output.kv_transfer_params = {control.MARKER: control.encode(frozen)}


class MigrationScheduler(MigrationMixin, Scheduler):
    """For engines that schedule one step at a time."""


class AsyncMigrationScheduler(MigrationMixin, AsyncScheduler):
    """For engines that schedule ahead of the device."""
