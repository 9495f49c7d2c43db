# SPDX-License-Identifier: Apache-2.0
"""Worker side of the connector: one transfer agent and its copy jobs.

Threading: every method is called from the engine's step thread. The agent posts and waits on other threads;
only ``copy_now`` waits, within its budget. The agent ends each transfer by its deadline.
Errors: a failed job is a result, never an exception; the scheduler decides what to recompute.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
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

logger = logging.getLogger(__name__)
_TOGETHER_BYTES = 1 << 30
"""Most bytes of jobs that are one copy, so that none waits long for the bytes of others."""


@dataclass
class _Copies:
    """The copies of jobs that begin together: what comes from the same source is one."""

    handles: list[TransferHandle]
    """A copy from each of the source's ranks that this one needs; none when all is here."""
    needed_by: set[int]
    """Jobs that have not been cancelled."""

    def cancel(self, job_id: int) -> None:
        """A job is cancelled: the last one ends the copies."""
        self.needed_by.discard(job_id)
        if not self.needed_by:
            for handle in self.handles:
                handle.cancel()


@dataclass
class _Flying:
    """A job under way."""

    job: Job
    copies: _Copies
    share: float
    """The job's part of what its copies move."""


class Loader:
    """Owns the transfer agent of one worker."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        self._config = vllm_config
        self._plan = kv_cache_config
        self._extra: dict[str, Any] = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._agent: TransferAgent | None = None
        self._flying: dict[int, _Flying] = {}
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
        # A hand-off has the source's deadline for its blocks; all rounds have the same one.
        self._begin(jobs, lambda job: (job.agents, job.deadline_s))
        for job_id in cancelled:
            if flying := self._flying.get(job_id):
                flying.copies.cancel(job_id)
        ended = [job_id for job_id, flying in self._flying.items() if all(h.done() for h in flying.copies.handles)]
        self._results += self._settle(ended)
        unsafe = self.agent.unsafe_blocks() if self._unquiet else frozenset()
        for job_id in [i for i, blocks in self._unquiet.items() if not blocks & unsafe]:
            del self._unquiet[job_id]
            self._quiet.append(job_id)

    def copy_now(self, jobs: Sequence[Job], budget_s: float) -> list[JobResult | None]:
        """Begin jobs and wait for them; None for one that does not end within the budget.

        All checksums are one call: each waits for the device, for which single ones would queue behind one another.
        """
        until = time.monotonic() + budget_s
        self._begin(jobs, lambda job: job.agents)
        ended = [job.job_id for job in jobs if self._wait(job.job_id, until)]
        results = {result.job_id: result for result in self._settle(ended)}
        return [results.get(job.job_id) for job in jobs]

    def _wait(self, job_id: int, until: float) -> bool:
        for handle in self._flying[job_id].copies.handles:
            try:
                handle.wait(max(0.0, until - time.monotonic()))
            except TimeoutError:
                return False
            except MigrateError:
                logger.debug("job %d has failed", job_id)
        return True

    def _begin(self, jobs: Sequence[Job], alike: Callable[[Job], Hashable]) -> None:
        """Begin jobs. Those that are alike are one copy, because each copy holds up the step by its own begin."""
        groups: dict[Hashable, list[Job]] = {}
        sizes: Counter[Hashable] = Counter()
        for job in jobs:
            key, size = job.remote_blocks and alike(job), len(job.remote_blocks) * self.agent.record.block_bytes
            if sizes[key] and sizes[key] + size > _TOGETHER_BYTES:
                self._begin_together(groups.pop(key))
                del sizes[key]
            groups.setdefault(key, []).append(job)
            sizes[key] += size
        for group in groups.values():
            self._begin_together(group)

    def _begin_together(self, jobs: Sequence[Job]) -> None:
        handles: list[TransferHandle] = []
        remote = [block for job in jobs for block in job.remote_blocks]
        local = [block for job in jobs for block in job.local_blocks]
        agents, deadline_s = jobs[0].agents, min(job.deadline_s for job in jobs)
        names = ", ".join(job.request_id for job in jobs)
        try:
            for rank in self.agent.sources(len(agents)) if remote else ():
                handles.append(self.agent.fetch(agents[rank], remote, local, request_id=names, deadline_s=deadline_s))
        except MigrateError as error:
            refused = TransferHandle()
            refused.settle(None, error)
            for handle in handles:
                handle.cancel()
            handles.append(refused)
        copies = _Copies(handles, {job.job_id for job in jobs})
        for job in jobs:
            self._flying[job.job_id] = _Flying(job, copies, len(job.remote_blocks) / max(1, len(remote)))

    def _settle(self, job_ids: Sequence[int]) -> list[JobResult]:
        """Results of jobs whose copies have ended."""
        ended = [(flying := self._flying.pop(job_id), *self._end(flying)) for job_id in job_ids]
        checked = [[c for c in flying.job.checks if c[0] not in bad] for flying, _, _, bad in ended]
        found: Iterator[int] = iter(())
        broken: MigrateError | None = None
        try:
            found = iter(self.agent.checksums(blocks) if (blocks := [b for c in checked for b, _ in c]) else ())
        except MigrateError as error:
            broken = error
        results = []
        for (flying, moved, failed, bad), checks in zip(ended, checked, strict=True):
            sums = [tuple(itertools.islice(found, self.agent.checksum_units)) for _ in checks]
            try:
                if checks and broken is not None:
                    raise broken
                wrong = [
                    block
                    for (block, remote), local in zip(checks, sums, strict=True)
                    if self.agent.expected(remote) != local
                ]
            except MigrateError as error:
                failed, wrong = failed or error, [block for block, _ in flying.job.checks]
            if wrong:
                failed = failed or IntegrityError(f"blocks {wrong} differ from what the source has")
                # When a source has lost its blocks, all are wrong, also those without checksum.
                bad |= {*wrong, *flying.job.vouched}
            results.append(_result(flying, moved) if failed is None else self._failed(flying.job, failed, tuple(bad)))
        return results

    def _end(self, flying: _Flying) -> tuple[list[TransferResult], MigrateError | None, set[int]]:
        """What the copies of a job have moved, why one of them failed, and the blocks that are bad then."""
        moved: list[TransferResult] = []
        failed: MigrateError | None = None
        unquiet: frozenset[int] = frozenset()
        for handle in flying.copies.handles:
            try:
                moved.append(handle.wait(0))
            except MigrateError as error:
                failed = failed or error
                unquiet |= frozenset(handle.unsafe_blocks).intersection(flying.job.local_blocks)
        if unquiet := unquiet and unquiet & self.agent.unsafe_blocks():
            self._unquiet[flying.job.job_id] = unquiet
        return moved, failed, set(flying.job.local_blocks) if failed else set()

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
        for job_id, flying in self._flying.items():
            flying.copies.cancel(job_id)
        self._flying.clear()
        if self._agent is not None:
            self._agent.close()


def _result(flying: _Flying, moved: Sequence[TransferResult]) -> JobResult:
    return JobResult(
        flying.job.job_id,
        ok=True,
        bytes=round(flying.share * sum(each.bytes for each in moved)),
        descriptors=round(flying.share * sum(each.descriptors for each in moved)),
        post_s=flying.share * sum(each.post_s for each in moved),
        wire_s=flying.share * max((each.wire_s for each in moved), default=0.0),
        lane=moved[0].lane if moved else "",
    )
