# SPDX-License-Identifier: Apache-2.0
"""The scheduler's record of each request, and the jobs that it gives to the workers.

A record lives as long as vLLM schedules its ``Request``. It has one ``phase``; what a move adds to it is in ``move``:
``Incoming`` (held until its commit while KV is copied) or ``Leaving`` (freezing or frozen). Jobs and their results
travel between scheduler and workers inside vLLM's connector metadata, in step with the forward passes; only the small
copy of a commit is a separate call (``ranks.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)
from vllm.v1.request import RequestStatus

from components.engine.kv import CommitTo, Frozen, KVOffer, LandingStatus, RequestId
from components.engine.protocol import RequestPhase
from components.engine.vllm.compat.grammars import Replay
from components.engine.vllm.control import Marker, Reply
from components.engine.vllm.parts import Parts
from components.errors import SessionError
from components.transfer.ids import AgentRef

if TYPE_CHECKING:
    from vllm.v1.request import Request


def use_until(frozen: Frozen, since: float) -> float:
    """Time until which the blocks of a state that arrived at ``since`` may be read, on the clock of ``since``."""
    return since + frozen.use_within_s if frozen.use_within_s else float("inf")


@dataclass
class Incoming:
    """The destination's side of a move: source blocks and the local blocks that they are copied into."""

    offer: KVOffer
    """The newest offer; a copy of all its blocks has been requested."""
    parts: Parts
    """Local blocks; none without room or without anything to copy."""
    job: Job | None = None
    commit: Frozen | None = None
    use_until: float = float("inf")
    """Time from which the source may free the blocks of ``commit``, on ``time.monotonic``."""
    progress: LandingStatus = LandingStatus(reserved=True)
    """What its jobs have moved."""
    waiters: list[Future[Reply]] = field(default_factory=list)
    """Calls that are answered when the round has ended."""


@dataclass
class Leaving:
    """The source's side: a request outside vLLM's queues, with its blocks."""

    was_running: bool
    frozen: Frozen | None = None
    """Set after the step in flight."""
    waiters: list[Future[Reply]] = field(default_factory=list)
    """Freeze calls that wait for it."""
    commit_to: CommitTo | None = None
    """Gets the state as soon as it is made."""
    use_within_s: float = 0.0


@dataclass
class Record:
    """One request, keyed by vLLM's internal id."""

    request: Request
    marker: Marker
    born: float
    move: Incoming | Leaving | None = None
    """None: vLLM runs or queues it."""
    landed: LandingStatus | None = None
    """Result of the landing."""
    direct: tuple[int, ...] | None = None
    """Output tokens of a commit by the source's engine."""
    needs_install: bool = False
    """True until the model runner has the tokens of the other engine."""
    rng_state: bytes = b""
    grammar: Replay | None = None
    """Replays the tokens of the other engine; None afterwards, and for requests without a grammar."""
    handoff: Frozen | None = None
    """Loan of a prefill engine, until vLLM has allocated blocks."""

    @property
    def request_id(self) -> RequestId:
        """The id of the caller of ``generate``, not vLLM's internal one."""
        return self.marker.request_id

    @property
    def phase(self) -> RequestPhase:
        """The protocol's phase of the request."""
        match self.move:
            case Leaving():
                return RequestPhase.FROZEN
            case Incoming():
                return RequestPhase.LANDING
        match self.request.status:
            case RequestStatus.RUNNING:
                return RequestPhase.PREFILL if self.request.is_prefill_chunk else RequestPhase.DECODE
            case RequestStatus.PREEMPTED:
                return RequestPhase.PREEMPTED
        return RequestPhase.WAITING

    @property
    def incoming(self) -> Incoming | None:
        """Its landing; None when it has none, or no longer."""
        return self.move if isinstance(self.move, Incoming) else None

    def require_incoming(self) -> Incoming:
        """``incoming``. Raises ``SessionError`` in place of None."""
        if self.incoming is None:
            raise SessionError(f"request {self.request_id} is not landing")
        return self.incoming

    @property
    def leaving(self) -> Leaving | None:
        """Its freeze; None when there is none, or no longer."""
        return self.move if isinstance(self.move, Leaving) else None


@dataclass(frozen=True)
class Job:
    """Copy blocks from the source."""

    job_id: int
    request_id: RequestId
    agents: tuple[AgentRef, ...]
    remote_blocks: tuple[int, ...]
    local_blocks: tuple[int, ...]
    checks: tuple[tuple[int, tuple[tuple[int, ...], ...]], ...]
    """(local block, its checksums at each rank of the source), compared after the copy."""
    vouched: tuple[int, ...]
    """Other copied local blocks; correct only if all checked ones are."""
    deadline_s: float


@dataclass(frozen=True)
class JobResult:
    """Result of a job on one worker."""

    job_id: int
    ok: bool
    error: tuple[str, str] | None = None
    bad_blocks: tuple[int, ...] = ()
    """Local blocks with wrong bytes."""
    quiet: bool = True
    """False: a hanging peer may still write to the job's blocks; ``StepResults.quiet`` names the job later."""
    bytes: int = 0
    descriptors: int = 0
    post_s: float = 0.0
    wire_s: float = 0.0
    lane: str = ""


@dataclass(frozen=True, repr=False)
class Install:
    """State of a request of another engine, for the model runner."""

    vllm_id: str
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    sampling_params: Any
    lora_request: Any
    rng_state: bytes
    mm_features: list[Any] = field(default_factory=list)

    def __repr__(self) -> str:
        """Without tokens, which are users' text."""
        counts = f"{len(self.prompt_token_ids)} + {len(self.output_token_ids)} tokens"
        return f"Install({self.vllm_id}, {counts})"

    anon_repr = __repr__
    """vLLM's log of a step's metadata in a crash, which otherwise has every field."""


@dataclass(frozen=True)
class Sums:
    """Checksums of blocks of a request on one worker."""

    vllm_id: str
    rank: int
    begun: Callable[[], tuple[int, ...]]
    """Waits for the device and returns the checksums."""

    @classmethod
    def known(cls, vllm_id: str, rank: int, checksums: tuple[int, ...]) -> Sums:
        """Checksums that are known already."""
        return cls(vllm_id, rank, lambda: checksums)

    def __reduce__(self) -> tuple[Any, ...]:
        """Other processes get the numbers: vLLM pickles a step's results after its tokens are known."""
        return Sums.known, (self.vllm_id, self.rank, self.begun())


@dataclass
class StepMetadata(KVConnectorMetadata):
    """Scheduler to workers, once a step."""

    installs: list[Install] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    """Jobs of earlier steps that are no longer needed."""
    to_sum: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    """Requests and blocks that this step completes, for checksums after it."""


@dataclass
class StepResults(KVConnectorWorkerMetadata):
    """Workers to scheduler, once a step: results of all ranks."""

    results: list[JobResult]
    quiet: list[int] = field(default_factory=list)
    """Jobs with ``quiet=False`` whose blocks are safe now."""
    sums: list[Sums] = field(default_factory=list)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> StepResults:
        """Join the results of two ranks; the scheduler counts them."""
        if not isinstance(other, StepResults):
            raise TypeError(f"cannot join {type(other).__name__} with StepResults")
        return StepResults(self.results + other.results, self.quiet + other.quiet, self.sums + other.sums)
