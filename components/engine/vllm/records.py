# SPDX-License-Identifier: Apache-2.0
"""What the scheduler remembers of a request that may move, and the jobs it hands to the workers.

A record lives exactly as long as vLLM's ``Request``. Jobs and their results cross the boundary between
scheduler and workers inside vLLM's own connector metadata, so they stay in step with the forward passes.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from components.engine.protocol import AgentRef, Frozen, KVOffer, LandingStatus, RequestId
from components.engine.vllm.control import Marker, Reply


@dataclass
class Landing:
    """The destination's side of a move: which source blocks are, or will be, in which of ours."""

    offer: KVOffer
    """The newest offer; its block ids are what has been asked for so far."""
    block_ids: list[int] = field(default_factory=list)
    """Our blocks, in order; empty until vLLM has allocated them."""
    requested_blocks: int = 0
    """Blocks that a job has been made for."""
    landed_blocks: int = 0
    """Blocks whose copy has succeeded, counted from the front without a gap."""
    local_blocks: int = 0
    """Blocks at the front that our own prefix cache already had."""
    held: bool = False
    """Nothing to copy in advance: no blocks are reserved, the request waits for the commit."""
    job: Job | None = None
    commit: Frozen | None = None
    rounds: int = 0
    bytes: int = 0
    descriptors: int = 0
    post_s: float = 0.0
    wire_s: float = 0.0
    lane: str = ""
    error: tuple[str, str] | None = None


@dataclass
class Record:
    """One request, keyed by the id that the router gave it."""

    marker: Marker
    request: Any
    """vLLM's ``Request``."""
    born: float
    landing: Landing | None = None
    landed: LandingStatus | None = None
    """How the landing went, once it is over."""
    frozen: Frozen | None = None
    frozen_from_waiting: bool = False
    waiters: list[Future[Reply]] = field(default_factory=list)
    """Freeze calls that wait for the step in flight."""
    freezing: bool = False
    needs_install: bool = False
    """The model runner has not been told of the tokens generated elsewhere yet."""
    rng_state: bytes = b""

    @property
    def request_id(self) -> RequestId:
        """The router's id, not vLLM's internal one."""
        return self.marker.request_id


@dataclass(frozen=True)
class Job:
    """Copy blocks from the source. ``wait`` jobs finish before the forward pass of their step."""

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
    wait: bool
    deadline_s: float


@dataclass(frozen=True)
class JobResult:
    """How a job ended on one worker."""

    job_id: int
    request_id: RequestId
    ok: bool
    error: tuple[str, str] | None = None
    bad_blocks: tuple[int, ...] = ()
    """Our blocks that do not hold the right bytes."""
    bytes: int = 0
    descriptors: int = 0
    post_s: float = 0.0
    wire_s: float = 0.0
    lane: str = ""


@dataclass(frozen=True)
class Install:
    """State of a request that was generated elsewhere, for the model runner."""

    vllm_id: str
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    sampling_params: Any
    lora_request: Any
    rng_state: bytes


@dataclass
class StepMetadata(KVConnectorMetadata):
    """Scheduler to workers, once a step."""

    installs: list[Install] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    rng_resets: dict[str, bytes] = field(default_factory=dict)


@dataclass
class StepResults(KVConnectorWorkerMetadata):
    """Workers to scheduler, once a step: one list of results for each rank, joined."""

    results: list[JobResult]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> StepResults:
        """Join the results of two ranks; the scheduler counts them."""
        if not isinstance(other, StepResults):
            raise TypeError(f"cannot join {type(other).__name__} with StepResults")
        return StepResults(self.results + other.results)
