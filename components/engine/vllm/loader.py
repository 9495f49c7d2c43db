# SPDX-License-Identifier: Apache-2.0
"""Worker side of the connector: one transfer agent and its copy jobs.

Threading: every method is called from the engine's step thread. The agent posts and waits on other threads;
only ``copy_now`` waits, within its budget. The agent ends each transfer by its deadline.
Errors: a failed job is a result, never an exception; the scheduler decides what to recompute.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from components.engine.vllm.compat.runners import runner_version
from components.engine.vllm.fingerprint import fingerprint, weights_of
from components.engine.vllm.pools import heads_of, pools_to_register
from components.engine.vllm.records import Job, JobResult, StepResults, Sums
from components.errors import IntegrityError, MigrateError
from components.transfer import (
    AgentConfig,
    SharedZeros,
    TransferAgent,
    TransferHandle,
    TransferResult,
    Transport,
)
from components.transfer.ids import AgentRef

logger = logging.getLogger(__name__)


class Loader:
    """Owns the transfer agent of one worker."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        self._config = vllm_config
        self._plan = kv_cache_config
        self._extra: dict[str, Any] = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._agent: TransferAgent | None = None
        self._flying: dict[int, tuple[Job, list[TransferHandle]]] = {}
        """Jobs, with a copy from each of the source's ranks that this one needs; none when all is here."""
        self._results: list[JobResult] = []
        self._unquiet: dict[int, frozenset[int]] = {}
        """Blocks of failed jobs that a hanging peer may still write to."""
        self._quiet: list[int] = []
        self._sums: list[Sums] = []
        self.fingerprint = ""
        self.weights = ""

    @property
    def rank(self) -> int:
        """Tensor-parallel rank of this worker."""
        from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

        return get_tensor_model_parallel_rank()

    @property
    def agent(self) -> TransferAgent:
        """The agent; exists once the KV caches are registered."""
        if self._agent is None:
            raise RuntimeError("KV caches are not registered yet")
        return self._agent

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Describe vLLM's cache tensors to the agent and publish it."""
        pools = pools_to_register(kv_caches, self._plan, heads_of(self._config))
        adapters = self._extra["migration"].get("adapters", "")
        self.weights = weights_of(self._config)
        runner = runner_version(self._config)
        self.fingerprint = fingerprint(self._config, self._plan, pools, runner, adapters, self.weights)
        settings = dict(self._extra["agent"])
        settings["name"] = f"{settings['name']}-tp{self.rank}"
        settings |= {
            "fingerprint": self.fingerprint,
            "block_size": self._config.cache_config.block_size,
            "dtype": str(self._config.model_config.dtype).removeprefix("torch."),
            "layers": len(pools),
            "tp_rank": self.rank,
            "tp_size": self._config.parallel_config.tensor_parallel_size,
        }
        self._agent = TransferAgent(AgentConfig.of(settings))
        self._agent.start(pools)

    def allocation(self) -> AbstractContextManager[Any] | None:
        """Context in which vLLM makes its caches: host memory that other workers of this host can map."""
        transport = Transport(self._extra["agent"].get("transport", Transport.AUTO))
        on_host = self._config.device_config.device_type == "cpu"
        return SharedZeros() if on_host and transport in (Transport.AUTO, Transport.SHM) else None

    def step(self, jobs: Sequence[Job], cancelled: Sequence[int] = ()) -> None:
        """Begin a step's jobs, cancel unneeded ones, collect finished ones."""
        for job in jobs:
            self._begin(job)
        for job_id in cancelled:
            for handle in self._flying[job_id][1] if job_id in self._flying else ():
                handle.cancel()
        for job_id in [i for i, (_, handles) in self._flying.items() if all(handle.done() for handle in handles)]:
            self._results.append(self._settle(job_id))
        unsafe = self.agent.unsafe_blocks() if self._unquiet else frozenset()
        for job_id in [i for i, blocks in self._unquiet.items() if not blocks & unsafe]:
            del self._unquiet[job_id]
            self._quiet.append(job_id)

    def copy_now(self, jobs: Sequence[Job], budget_s: float) -> list[JobResult | None]:
        """Begin jobs and wait for them; None for one that does not end within the budget."""
        until = time.monotonic() + budget_s
        for job in jobs:
            self._begin(job)
        return [self._wait(job.job_id, until) for job in jobs]

    def _wait(self, job_id: int, until: float) -> JobResult | None:
        for handle in self._flying[job_id][1]:
            try:
                handle.wait(max(0.0, until - time.monotonic()))
            except TimeoutError:
                return None
            except MigrateError:
                logger.debug("job %d has failed", job_id)
        return self._settle(job_id)

    def _begin(self, job: Job) -> None:
        handles: list[TransferHandle] = []
        try:
            for rank in self.agent.sources(len(job.agents)) if job.src_blocks else ():
                handles.append(self._fetch(job, job.agents[rank]))
        except MigrateError as error:
            refused = TransferHandle()
            refused.settle(None, error)
            for handle in handles:
                handle.cancel()
            handles.append(refused)
        self._flying[job.job_id] = (job, handles)

    def _fetch(self, job: Job, agent: AgentRef) -> TransferHandle:
        return self.agent.fetch(
            AgentRef(agent.name, agent.epoch),
            job.src_blocks,
            job.dst_blocks,
            request_id=job.request_id,
            deadline_s=job.deadline_s,
        )

    def _settle(self, job_id: int) -> JobResult:
        job, handles = self._flying.pop(job_id)
        moved: list[TransferResult] = []
        failed: MigrateError | None = None
        unquiet: frozenset[int] = frozenset()
        for handle in handles:
            try:
                moved.append(handle.wait(0))
            except MigrateError as error:
                failed = failed or error
                unquiet |= frozenset(handle.unsafe_blocks) & self.agent.unsafe_blocks()
        if unquiet:
            self._unquiet[job_id] = unquiet
        bad = set(job.dst_blocks) if failed else set()
        try:
            wrong = self._wrong_blocks(job, bad)
        except MigrateError as error:
            failed, wrong = failed or error, tuple(block for block, _ in job.checks)
        if wrong:
            failed = failed or IntegrityError(f"blocks {list(wrong)} differ from what the source has")
            # When a source has lost its blocks, all are wrong, also those without checksum.
            bad |= {*wrong, *job.vouched}
        if failed is not None:
            return self._failed(job, failed, tuple(bad))
        return JobResult(
            job_id,
            ok=True,
            bytes=sum(each.bytes for each in moved),
            descriptors=sum(each.descriptors for each in moved),
            post_s=sum(each.post_s for each in moved),
            wire_s=max((each.wire_s for each in moved), default=0.0),
            lane=moved[0].lane if moved else "",
        )

    def _wrong_blocks(self, job: Job, missing: set[int]) -> tuple[int, ...]:
        checks = [check for check in job.checks if check[0] not in missing]
        if not checks:
            return ()
        units, found = self.agent.checksum_units, self.agent.checksums([block for block, _ in checks])
        return tuple(
            block
            for number, (block, sums) in enumerate(checks)
            if self.agent.expected(sums) != found[number * units : (number + 1) * units]
        )

    def _failed(self, job: Job, error: MigrateError, bad_blocks: tuple[int, ...]) -> JobResult:
        logger.warning("KV blocks of request %s did not arrive: %s", job.request_id, error)
        quiet = job.job_id not in self._unquiet
        return JobResult(job.job_id, ok=False, error=(error.code, str(error)), bad_blocks=bad_blocks, quiet=quiet)

    def sum(self, wanted: list[tuple[str, tuple[int, ...]]]) -> None:
        """Begin checksums of blocks that the step completes."""
        for vllm_id, blocks in wanted:
            # The model may still run: readers of the step's tokens wait for it anyway.
            self._sums.append(Sums(vllm_id, self.rank, self.agent.begin_checksums(blocks)))

    def take_results(self) -> StepResults | None:
        """Results since the last call."""
        if not self._results and not self._quiet and not self._sums:
            return None
        results = StepResults(self._results, self._quiet, self._sums)
        self._results, self._quiet, self._sums = [], [], []
        return results

    def close(self) -> None:
        """Cancel jobs in flight and withdraw the agent."""
        for _, handles in self._flying.values():
            for handle in handles:
                handle.cancel()
        self._flying.clear()
        if self._agent is not None:
            self._agent.close()
