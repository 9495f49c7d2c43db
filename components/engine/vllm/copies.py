# SPDX-License-Identifier: Apache-2.0
"""Copies of a source's blocks: the jobs of the workers, from their begin until nothing can land in their blocks.

No step reads blocks that a copy of the same step fills. Rounds run beside the steps. The commit's tail, if small, is
copied between two steps, within a budget of a few times what the lane took for as many bytes before (``_budget``), at
most ``MAX_WAIT_S``; a copy that takes longer goes on beside the steps, and the next ones of that source do from their
beginning. So a silent source delays the other requests of this engine once, by that budget.

Blocks belong to the jobs that name them: a request that ends, or starts over, while a job may still write leaves its
blocks to that job, and they are free when the last worker says that nothing can land in them any more.

Threading: the engine core's thread. A failed copy is no error.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from components.engine.vllm.claims import Cache
from components.engine.vllm.compat.scheduler import SchedulerPort
from components.engine.vllm.ranks import Ranks
from components.engine.vllm.records import Incoming, Job, JobResult, Record, StepResults
from components.engine.vllm.transfers import Transfers
from components.timeline import mark
from components.transfer.ids import AgentRef

MAX_WAIT_S = 0.25
"""Upper bound on the time for which a commit's copy holds up the other requests."""
_MIN_WAIT_S = 0.02
_FIRST_GUESS = 1e9
"""Bytes a second of a lane that has not copied anything yet."""


@dataclass
class Flight:
    """A job that the workers have."""

    job: Job
    record: Record
    results: list[JobResult] = field(default_factory=list)
    quiet: int = 0
    """Workers on which nothing can land in its blocks any more."""
    blocks: list[KVCacheBlock] = field(default_factory=list)
    """Blocks of a request that has ended or started over."""

    @property
    def failed(self) -> JobResult | None:
        """The first result that is a failure."""
        return next((result for result in self.results if not result.ok), None)


class Copies:
    """See the module docstring. ``settled`` is called with a job that a request still waits for, once all workers have
    ended it.
    """

    def __init__(
        self,
        port: SchedulerPort,
        cache: Cache,
        wait_bytes: int,
        deadline_s: float,
        ranks: Callable[[], Ranks],
        settled: Callable[[Flight, Incoming], None],
    ) -> None:
        self._port = port
        self._cache = cache
        self._wait_bytes = wait_bytes
        self._deadline_s = deadline_s
        self._ranks = ranks
        self._settled = settled
        self.refused: Counter[str] = Counter()
        """Copies whose blocks were not used, by error code."""
        self.prompts = Transfers()
        self._job_ids = itertools.count(1)
        self._new: list[Job] = []
        self._cancelled: list[int] = []
        self._flights: dict[int, Flight] = {}
        self._bytes_per_s = _FIRST_GUESS
        self._late: set[AgentRef] = set()
        """Agents whose last copy was late: no step waits for them until a copy of theirs arrives."""
        self._urgent: list[Job] = []
        """Copies that the next step waits for."""

    # Begin

    def beside_steps(self, record: Record, num_tokens: int, whole: bool = False) -> None:
        """Copy the blocks of ``num_tokens`` tokens that no job copies yet; ``whole``: full ones only."""
        self._new.append(self._job(record, num_tokens, whole))

    def tail(self, record: Record, may_wait: bool) -> None:
        """Copy all that the newest offer has and this engine has not: ``may_wait`` lets the next step wait for it."""
        job = self._job(record, record.require_incoming().offer.num_tokens)
        size = len(job.remote_blocks) * self._cache.bytes_per_block
        late = size > self._wait_bytes or not self._late.isdisjoint(job.agents)
        if not may_wait or late or self._port.neighbours.may_read(job.local_blocks):
            self._new.append(job)
            return
        self._urgent.append(job)

    def before_step(self) -> None:
        """Copy together what the step waits for: a call for each commit would hold up all other requests by its own
        time, and commits that come meanwhile would find no step between them.
        """
        if not self._urgent:
            return
        jobs, self._urgent = self._urgent, []
        size = sum(len(job.remote_blocks) for job in jobs) * self._cache.bytes_per_block
        for results in self._ranks().copy(jobs, self._budget(size)):
            for job, result in zip(jobs, results, strict=True):
                mark("target-core", "copy", job.request_id)
                if result is None:
                    self._late.update(job.agents)
                else:
                    self._take(result)

    def _budget(self, size: int) -> float:
        return min(MAX_WAIT_S, max(_MIN_WAIT_S, 4 * size / self._bytes_per_s))

    def _job(self, record: Record, num_tokens: int, whole: bool = False) -> Job:
        incoming = record.require_incoming()
        parts, frozen = incoming.parts, incoming.commit
        remote_blocks, local_blocks = parts.take(incoming.offer, num_tokens, whole)
        proof = frozen if frozen is not None and frozen.checksums else None
        job = Job(
            job_id=next(self._job_ids),
            request_id=record.request_id,
            agents=incoming.offer.agents,
            remote_blocks=remote_blocks,
            local_blocks=local_blocks,
            checks=parts.checks(proof) if proof is not None else (),
            vouched=parts.vouched(proof) if proof is not None else (),
            deadline_s=max(0.0, min(self._deadline_s, incoming.use_until - time.monotonic())),
        )
        incoming.job = job
        incoming.progress = msgspec.structs.replace(incoming.progress, rounds=incoming.progress.rounds + 1)
        self._flights[job.job_id] = Flight(job, record)
        return job

    # Run

    def take_new_jobs(self) -> tuple[list[Job], list[int]]:
        """Jobs for the workers to begin with this step, and earlier ones to cancel."""
        taken = self._new, self._cancelled
        self._new, self._cancelled = [], []
        return taken

    @property
    def busy(self) -> bool:
        """True while a worker owes a result or holds blocks."""
        return bool(self._flights)

    def take_results(self, results: StepResults) -> None:
        """Take the results of the workers' jobs since the last step."""
        for result in results.results:
            self._take(result)
        for job_id in results.quiet:
            self._quiet(self._flights[job_id])

    def _take(self, result: JobResult) -> None:
        flight = self._flights[result.job_id]
        flight.results.append(result)
        if len(flight.results) == self._cache.num_ranks:
            incoming = flight.record.incoming
            if incoming is not None and incoming.job is flight.job:
                incoming.job = None
                self._note(flight, incoming)
                self._settled(flight, incoming)
        if result.quiet:
            self._quiet(flight)

    def _quiet(self, flight: Flight) -> None:
        flight.quiet += 1
        if flight.quiet == self._cache.num_ranks:
            del self._flights[flight.job.job_id]
            if flight.blocks:
                self._port.free_blocks_of(flight.blocks)

    def _note(self, flight: Flight, incoming: Incoming) -> None:
        results, failed = flight.results, flight.failed
        if flight.record.marker.handoff is not None:
            self.prompts.note(results)
        incoming.progress = incoming.progress.after(
            sum(r.bytes for r in results),
            sum(r.descriptors for r in results),
            max(r.post_s for r in results),
            max(r.wire_s for r in results),
            results[0].lane,
        )
        if failed is None:
            incoming.parts.landed()
            self._late.difference_update(flight.job.agents)
            self._learn(results)
            return
        incoming.parts.failed({block for r in results for block in r.bad_blocks})
        incoming.progress = msgspec.structs.replace(incoming.progress, error=failed.error)
        if failed.error is not None:
            self.refused[failed.error[0]] += 1

    def _learn(self, results: Iterable[JobResult]) -> None:
        for result in results:
            if result.bytes and result.wire_s:
                self._bytes_per_s += (result.bytes / result.wire_s - self._bytes_per_s) / 4

    # Ends

    def stop(self, incoming: Incoming) -> Flight | None:
        """Drop a job that no worker has yet. A job that workers have is cancelled and returned: it may still write for
        a while.
        """
        job, incoming.job = incoming.job, None
        if job is None:
            return None
        for waiting in (self._new, self._urgent):
            if job in waiting:
                waiting.remove(job)
                del self._flights[job.job_id]
                return None
        self._cancelled.append(job.job_id)
        return self._flights[job.job_id]

    def kept_blocks(self) -> Iterable[KVCacheBlock]:
        """Blocks that belong to jobs, not to requests."""
        return itertools.chain.from_iterable(flight.blocks for flight in self._flights.values())
