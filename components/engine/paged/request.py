# SPDX-License-Identifier: Apache-2.0
"""One request in the engine, and the destination's side of its move.

An ``Active`` lives from the first pull of ``generate`` to its last output. It is in one of these states: waiting,
running, frozen, landing, ended. Threading: one asyncio loop.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import msgspec

from components.engine.kv import Frozen, KVOffer, LandingStatus, RequestId
from components.engine.protocol import (
    FinishReason,
    GenerateOutput,
    GenerateRequest,
    RequestInfo,
    RequestPhase,
    Sampling,
    TokenLogprob,
)
from components.errors import InvalidRequest
from components.transfer import TransferHandle
from components.wire import UNREADABLE


@dataclass
class Landing:
    """Source blocks and the local blocks that they are copied into."""

    offer: KVOffer
    """The newest offer; a copy of all its blocks has been requested."""
    landed_blocks: int = 0
    """Blocks copied without a gap from the front."""
    handle: TransferHandle | None = None
    """The copy in flight."""
    round: asyncio.Task[None] | None = None
    commit: Frozen | None = None
    progress: LandingStatus = LandingStatus(reserved=True)

    def status(self, block_size: int) -> LandingStatus:
        """Progress so far."""
        landed = self.landed_blocks * block_size
        return msgspec.structs.replace(self.progress, landed_tokens=landed, in_flight=self.round is not None)


@dataclass(eq=False)
class Active:
    """See the module docstring."""

    request: GenerateRequest
    tokens: list[int]
    """Prompt and output."""
    born: float
    arrival: int
    phase: RequestPhase
    max_outputs: int
    salt: int
    generator: int
    """State of the request's generator; 0 without one."""
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    """Tokens whose KV is in ``blocks``."""
    generation: int = 0
    """Number of preemptions; see ``KVOffer``."""
    preemptions: int = 0
    frozen: Frozen | None = None
    waiters: list[asyncio.Future[Frozen]] = field(default_factory=list)
    """Freeze calls that wait for the step in flight."""
    landing: Landing | None = None
    landed: LandingStatus | None = None
    """Result of the landing."""
    out: asyncio.Queue[GenerateOutput] = field(default_factory=asyncio.Queue)
    ended: bool = False

    @property
    def request_id(self) -> RequestId:
        """The caller's id."""
        return self.request.request_id

    @property
    def outputs(self) -> tuple[int, ...]:
        """All output tokens, from every worker."""
        return tuple(self.tokens[len(self.request.prompt_token_ids) :])

    @property
    def num_outputs(self) -> int:
        """Number of output tokens."""
        return len(self.tokens) - len(self.request.prompt_token_ids)

    def emit(self, token: int, logprobs: tuple[TokenLogprob, ...], reason: FinishReason | None) -> None:
        """Put a new token into the stream."""
        stop = token if reason is FinishReason.STOP else None
        self.out.put_nowait(GenerateOutput(self.num_outputs - 1, (token,), logprobs, reason, stop))

    def finish(self, reason: FinishReason, error: tuple[str, str] | None = None) -> None:
        """The last output, without a token."""
        self.out.put_nowait(GenerateOutput(self.num_outputs, finish_reason=reason, error=error))

    def describe(self, now: float) -> RequestInfo:
        """Row of the per-request table."""
        return RequestInfo(
            request_id=self.request_id,
            phase=self.phase,
            prompt_tokens=len(self.request.prompt_token_ids),
            output_tokens=self.num_outputs,
            kv_blocks=len(self.blocks),
            age_s=now - self.born,
            priority=self.request.priority,
            max_tokens=self.request.sampling.max_tokens,
            preemptions=self.preemptions,
            not_migratable=self.request.sampling.why_not_migratable(),
        )


def read(request: GenerateRequest) -> GenerateRequest:
    """``native`` is ``Sampling`` as msgpack. Raises ``InvalidRequest`` when it is malformed."""
    if not request.native:
        return request
    try:
        sampling = msgspec.msgpack.decode(request.native, type=Sampling)
    except UNREADABLE as error:
        raise InvalidRequest(f"a request that this engine cannot read: {error}") from error
    return msgspec.structs.replace(request, sampling=sampling, native=b"")
