# SPDX-License-Identifier: Apache-2.0
"""What the scheduler remembers of each request, and the jobs that it hands to the workers.

A record lives as long as vLLM schedules its ``Request``. It is *here* (vLLM runs or queues it), *incoming* (held until
its commit while KV is copied) or *leaving* (being frozen, or frozen). Jobs and their results cross the boundary
between scheduler and workers inside vLLM's own connector metadata, so they stay in step with the forward passes; only
the small copy of a commit is a call of its own (``ranks.py``).
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

from components.engine.protocol import AgentRef, Frozen, KVOffer, LandingStatus, RequestId
from components.engine.vllm.compat.grammars import Replay
from components.engine.vllm.control import Marker, Reply
from components.engine.vllm.parts import Parts

if TYPE_CHECKING:
    from vllm.v1.request import Request


def use_until(frozen: Frozen, since: float) -> float:
    """Until when the blocks of a state that came at ``since`` may be read, on the clock of ``since``."""
    return since + frozen.use_within_s if frozen.use_within_s else float("inf")


@dataclass
class Incoming:
    """The destination's side of a move: which source blocks are, or will be, in which of ours."""

    offer: KVOffer
    """The newest offer; its block ids are what has been asked for so far."""
    parts: Parts
    """Our blocks; none while there was no room, or nothing to copy."""
    job: Job | None = None
    commit: Frozen | None = None
    use_until: float = float("inf")
    """When the source may give the blocks of ``commit`` away, on ``time.monotonic``."""
    rounds: int = 0
    bytes: int = 0
    descriptors: int = 0
    post_s: float = 0.0
    wire_s: float = 0.0
    lane: str = ""
    error: tuple[str, str] | None = None


@dataclass
class Leaving:
    """The source's side: taken out of vLLM's queues, with its blocks."""

    was_running: bool
    by_itself: bool
    """Frozen after its n-th token, as the request asked: the state leaves with that token's output."""
    frozen: Frozen | None = None
    """Set once the step in flight is over."""
    waiters: list[Future[Reply]] = field(default_factory=list)
    """Freeze calls that wait for that."""


@dataclass
class Record:
    """One request, keyed by vLLM's internal id."""

    request: Request
    marker: Marker
    born: float
    incoming: Incoming | None = None
    landed: LandingStatus | None = None
    """How the landing went, once it is over."""
    leaving: Leaving | None = None
    needs_install: bool = False
    """The model runner has not been told of the tokens generated elsewhere yet."""
    rng_state: bytes = b""
    grammar: Replay | None = None
    """Replays the tokens generated elsewhere; None once it has, and for requests without a grammar."""
    handoff: Frozen | None = None
    """What a prefill engine lends to this request, until vLLM has given it blocks."""

    @property
    def request_id(self) -> RequestId:
        """The id that the caller of ``generate`` chose, not vLLM's internal one."""
        return self.marker.request_id


@dataclass(frozen=True)
class Job:
    """Copy blocks from the source."""

    job_id: int
    request_id: RequestId
    vllm_id: str
    agents: tuple[AgentRef, ...]
    src_blocks: tuple[int, ...]
    dst_blocks: tuple[int, ...]
    checks: tuple[tuple[int, tuple[int, ...]], ...]
    """(our block, its checksum at the source, one for each rank), compared once all bytes are here."""
    vouched: tuple[int, ...]
    """Our other copied blocks: right only if all that are checked are."""
    deadline_s: float


@dataclass(frozen=True)
class JobResult:
    """How a job ended on one worker."""

    job_id: int
    ok: bool
    error: tuple[str, str] | None = None
    bad_blocks: tuple[int, ...] = ()
    """Our blocks that do not hold the right bytes."""
    quiet: bool = True
    """False: a peer that hangs may still write into the job's blocks; ``StepResults.quiet`` names the job later."""
    bytes: int = 0
    descriptors: int = 0
    post_s: float = 0.0
    wire_s: float = 0.0
    lane: str = ""


@dataclass(frozen=True, repr=False)
class Install:
    """State of a request that was generated elsewhere, for the model runner."""

    vllm_id: str
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    sampling_params: Any
    lora_request: Any
    rng_state: bytes

    def __repr__(self) -> str:
        """Without tokens: they are somebody's text."""
        counts = f"{len(self.prompt_token_ids)} + {len(self.output_token_ids)} tokens"
        return f"Install({self.vllm_id}, {counts})"

    anon_repr = __repr__
    """What vLLM writes of a step's metadata when it crashes: without this, every field."""


@dataclass(frozen=True)
class Sums:
    """Checksums of blocks of a request on one worker."""

    vllm_id: str
    rank: int
    begun: Callable[[], tuple[int, ...]]
    """Gives them, and waits for the device."""

    @classmethod
    def known(cls, vllm_id: str, rank: int, checksums: tuple[int, ...]) -> Sums:
        """When there is nothing to wait for."""
        return cls(vllm_id, rank, lambda: checksums)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process gets the numbers; vLLM pickles a step's results when its tokens are known."""
        return Sums.known, (self.vllm_id, self.rank, self.begun())


@dataclass
class StepMetadata(KVConnectorMetadata):
    """Scheduler to workers, once a step."""

    installs: list[Install] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    """Jobs of earlier steps that nobody needs any more."""
    to_sum: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    """Requests and blocks that this step completes, to be summed after it."""


@dataclass
class StepResults(KVConnectorWorkerMetadata):
    """Workers to scheduler, once a step: what each rank has to say, joined."""

    results: list[JobResult]
    quiet: list[int] = field(default_factory=list)
    """Jobs into whose blocks nothing can be written any more, although their result said so."""
    sums: list[Sums] = field(default_factory=list)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> StepResults:
        """Join the results of two ranks; the scheduler counts them."""
        if not isinstance(other, StepResults):
            raise TypeError(f"cannot join {type(other).__name__} with StepResults")
        return StepResults(self.results + other.results, self.quiet + other.quiet, self.sums + other.sums)
