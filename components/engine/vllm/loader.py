# SPDX-License-Identifier: Apache-2.0
"""Worker side of the connector: one transfer agent, the copy jobs in flight, the model runner's state.

Threading: every method is called from the engine's step thread. The agent posts and waits on threads
of its own; only ``wait`` jobs block the step, for their deadline at most.
Errors: a failed job is a result, never an exception: the scheduler decides what to recompute.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import torch

from components.engine.protocol import AgentRef
from components.engine.vllm.fingerprint import fingerprint
from components.engine.vllm.pools import pools_of
from components.engine.vllm.records import Job, JobResult, StepMetadata
from components.engine.vllm.runner_state import RunnerState
from components.errors import DeadlineExceeded, IntegrityError, MigrateError
from components.transfer import (
    AgentConfig,
    KVPool,
    TransferAgent,
    TransferHandle,
    TransferResult,
    Transport,
    move_to_shared_memory,
)

logger = logging.getLogger(__name__)
_QUIET_S = 30.0
"""How long a failed copy may keep a step from recomputing its blocks."""


class Loader:
    """Owns the transfer agent of one worker."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        self._config = vllm_config
        self._plan = kv_cache_config
        self._extra: dict[str, Any] = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._agent: TransferAgent | None = None
        self._flying: dict[int, tuple[Job, TransferHandle | None, float]] = {}
        self._results: list[JobResult] = []
        self._failed_blocks: set[int] = set()
        self.fingerprint = ""
        self.kv_bytes_per_token = 0
        self.runner = RunnerState()

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
        pools = pools_of(kv_caches, self._plan)
        self._share(pools)
        self.fingerprint = fingerprint(self._config, pools, self._extra["migration"].get("runner", ""))
        block_size = self._config.cache_config.block_size
        settings = dict(self._extra["agent"])
        settings["name"] = f"{settings['name']}-tp{self.rank}"
        settings |= {
            "fingerprint": self.fingerprint,
            "block_size": block_size,
            "dtype": str(self._config.model_config.dtype).removeprefix("torch."),
            "layers": len(pools),
            "tp_rank": self.rank,
            "tp_size": self._config.parallel_config.tensor_parallel_size,
        }
        self._agent = TransferAgent(AgentConfig(**settings))
        self._agent.start(pools)
        self.kv_bytes_per_token = self._agent.record.block_bytes // block_size

    def _share(self, pools: list[KVPool]) -> None:
        """Move host pools to where workers of this host can map them, before anything has taken their addresses."""
        transport = Transport(self._extra["agent"].get("transport", Transport.AUTO))
        if pools[0].tensor.is_cuda or transport not in (Transport.AUTO, Transport.SHM):
            return
        if reason := move_to_shared_memory(pools):
            logger.info("KV blocks are not mapped between workers: %s", reason)

    def install(self, meta: StepMetadata) -> None:
        """Tell the model runner of requests that were generated elsewhere."""
        for install in meta.installs:
            self.runner.install(install)
        for vllm_id, state in meta.rng_resets.items():
            self.runner.set_rng_state(vllm_id, state)

    def start(self, meta: StepMetadata) -> None:
        """Start the step's jobs, finish its ``wait`` jobs, collect older ones that are done."""
        for job in meta.jobs:
            if not job.src_blocks:
                self._flying[job.job_id] = (job, None, time.monotonic())
                continue
            try:
                handle = self.agent.fetch(
                    AgentRef(job.agents[self.rank].name, job.agents[self.rank].epoch),
                    job.src_blocks,
                    job.dst_blocks,
                    request_id=job.request_id,
                    deadline_s=job.deadline_s,
                )
            except MigrateError as error:
                self._fail(job, error, job.dst_blocks)
                continue
            self._flying[job.job_id] = (job, handle, time.monotonic())
        for job in meta.jobs:
            if job.wait and job.job_id in self._flying:
                self._settle(job.job_id)
        for job_id in [i for i, (_, handle, _) in self._flying.items() if handle is None or self._quiet(handle)]:
            self._settle(job_id)

    def _quiet(self, handle: TransferHandle) -> bool:
        """Over, and no peer that hangs may still write into its blocks."""
        return handle.done() and not set(handle.poisoned_blocks) & self.agent.poisoned_blocks()

    def _wait_until_quiet(self, handle: TransferHandle) -> None:
        end = time.monotonic() + _QUIET_S
        while not self._quiet(handle):
            if time.monotonic() > end:
                # Recomputing into these blocks could give wrong tokens: end this engine, the router replays.
                raise RuntimeError("a peer that hangs may still write into KV blocks of this engine")
            time.sleep(0.001)

    def _settle(self, job_id: int) -> None:
        job, handle, started = self._flying.pop(job_id)
        moved, failed = TransferResult(), None
        if handle is not None:
            try:
                moved = handle.wait(max(0.0, job.deadline_s - (time.monotonic() - started)) + 1.0)
            except (MigrateError, TimeoutError) as error:
                handle.cancel()
                self._wait_until_quiet(handle)
                failed = error if isinstance(error, MigrateError) else DeadlineExceeded(str(error))
        bad = set(job.dst_blocks) if failed else set()
        wrong = self._wrong_blocks(job, bad)
        if wrong:
            failed = failed or IntegrityError(f"blocks {list(wrong)} differ from what the source has")
            # Those of a source that has lost them are all wrong, also where nobody has looked.
            bad |= {*wrong, *job.vouched}
        if failed is not None:
            self._fail(job, failed, tuple(bad))
            return
        self._results.append(
            JobResult(
                job.job_id,
                job.request_id,
                ok=True,
                bytes=moved.bytes,
                descriptors=moved.descriptors,
                post_s=moved.post_s,
                wire_s=moved.wire_s,
                lane=moved.lane,
            )
        )

    def _wrong_blocks(self, job: Job, missing: set[int]) -> tuple[int, ...]:
        checks = [check for check in job.checks if check[0] not in missing]
        if not checks:
            return ()
        found = self.agent.checksums([block for block, _ in checks])
        return tuple(block for (block, sums), here in zip(checks, found, strict=True) if sums[self.rank] != here)

    def _fail(self, job: Job, error: MigrateError, bad_blocks: tuple[int, ...]) -> None:
        logger.warning("KV blocks of request %s did not arrive: %s", job.request_id, error)
        if job.wait:
            self._failed_blocks.update(bad_blocks)
        self._results.append(
            JobResult(job.job_id, job.request_id, ok=False, error=(error.code, str(error)), bad_blocks=bad_blocks)
        )

    def take_results(self) -> list[JobResult]:
        """Results since the last call."""
        results, self._results = self._results, []
        return results

    def take_failed_blocks(self) -> set[int]:
        """Our blocks that ``wait`` jobs failed to fill since the last call."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def close(self) -> None:
        """Cancel what flies and withdraw the agent."""
        for _, handle, _ in self._flying.values():
            if handle is not None:
                handle.cancel()
        self._flying.clear()
        if self._agent is not None:
            self._agent.close()
