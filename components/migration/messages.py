# SPDX-License-Identifier: Apache-2.0
"""What workers say to each other, and what planners and the command line say to workers.

One endpoint, ``<namespace>.<component>.migrate``, answers every ``WorkerCall``: with one ``WorkerReply``, or, for
``attach``, with a stream of ``Attached``. ``components.messages`` packs, bounds and seals them.

A call names a *life* of a request, not the request: each stay of a request in an engine has a random number, and a
call with another number is refused. A late, doubled or crossed call therefore never hits the next life.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec

from components.engine.protocol import (
    EngineInfo,
    EngineStats,
    Frozen,
    GenerateOutput,
    KVOffer,
    LandingStatus,
    RequestId,
    RequestPhase,
    TokenLogprob,
)

Life = int
"""Number of one stay of a request in one engine: 63 random bits."""


class Mode(StrEnum):
    """How a request moves. ``REPLAY`` recomputes its KV, as Dynamo's own migration does."""

    LIVE = "live"
    STOP_AND_COPY = "stop-and-copy"
    REPLAY = "replay"


class Owner(msgspec.Struct, frozen=True):
    """Where a request runs: the instance id of a worker, and the number of its life there."""

    instance: int
    life: Life
    prompt_tokens: int = 0
    """How much of a repeated request is the client's prompt; the rest is the answer so far."""
    tried: tuple[int, ...] = ()
    """Workers to which the frontend had sent the request when it moved: it sends it to none of them again."""
    order: tuple[int, ...] = ()
    """The attempts to move it that led here, one number for each life: what a source tries after it has taken a request
    back is later than all that became of the attempt before."""


class Ticket(msgspec.Struct, frozen=True, omit_defaults=True):
    """Everything that another worker needs to go on with a request, but its KV and its tokens at the freeze."""

    request_id: RequestId
    life: Life
    """Number of the life that begins at the receiver."""
    prompt_token_ids: tuple[int, ...]
    native: bytes
    """The request in the engine's own form; only engines with the same fingerprint read it."""
    fingerprint: str
    output_token_ids: tuple[int, ...] = ()
    tried: tuple[int, ...] = ()
    """As in ``Owner``."""
    max_tokens: int | None = None
    attached: str = ""
    """Why the frontend does not send this request again, so that somebody must relay it to its end; empty: it does."""
    trace: dict[str, str] = {}
    """W3C headers of the trace that the request belongs to."""
    order: tuple[int, ...] = ()
    """As in ``Owner``."""


class Handover(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a prefill worker says of a request, by way of the frontend: who lends its blocks, or who has it already."""

    owner: Owner | None = None
    fingerprint: str = ""
    instance: int = 0
    frozen: Frozen | None = None
    """The KV of the prompt, and the first token."""
    stops: bool = False
    """The first token is one that ends an answer."""
    captured: bool = False
    """The engine gives more with each token than can be passed on: experts that were chosen, masks."""
    logprobs: tuple[TokenLogprob, ...] = ()


class WorkerOp(StrEnum):
    """Calls that a worker's ``migrate`` endpoint answers."""

    RELEASE = "release"
    """Blocks that a prefill worker lends, named by the offer's request id, are not needed any more."""
    RESERVE = "reserve"
    LANDING = "landing"
    EXTEND = "extend"
    EXPECT_COMMIT = "expect-commit"
    COMMIT = "commit"
    ABORT = "abort"
    ATTACH = "attach"
    OWNERS = "owners"
    SUSPECTS = "suspects"
    """Requests that were in flight when the caller's engine died."""
    STATUS = "status"
    MIGRATE = "migrate"
    DRAIN = "drain"
    UNDRAIN = "undrain"
    CHECK = "check"


class WorkerCall(msgspec.Struct, frozen=True, omit_defaults=True):
    """One call to a worker."""

    op: WorkerOp
    request_id: RequestId = RequestId("")
    life: Life = 0
    ticket: Ticket | None = None
    offer: KVOffer | None = None
    tokens: tuple[int, ...] = ()
    frozen: Frozen | None = None
    hold_s: float = 0.0
    """``expect-commit``: for how long to begin no step. ``landing``: when to answer though blocks are on the way."""
    index: int = 0
    """``attach``: output token to begin with; -1 for the first one that is made there."""
    owners: Annotated[tuple[tuple[RequestId, Owner], ...], msgspec.Meta(max_length=65536)] = ()
    suspects: Annotated[tuple[RequestId, ...], msgspec.Meta(max_length=65536)] = ()
    target: int = 0
    """``migrate``: instance id of the destination; 0 lets the worker choose."""
    mode: Mode = Mode.LIVE
    timeout_s: float = 60.0
    requests: bool = True
    """``status``: with the table of requests."""
    since: int = 0
    """``status``: the version that the caller has; 0 for nothing yet."""
    moves_since: int = 0
    """``status``: how many moves of this worker the caller has been told of."""
    after: int = 0
    """``status``: row that the page before ended with."""


class MoveRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """One migration that has ended, as its source saw it. Times in seconds."""

    request_id: str
    source: str
    target: str
    mode: Mode
    ok: bool
    code: str = ""
    """``components.errors`` code of what went wrong; empty when nothing did."""
    reason: str = ""
    """Why it failed, or why the mode is not the one asked for."""
    tokens: int = 0
    rounds: int = 0
    bytes: int = 0
    descriptors: int = 0
    post_s: float = 0.0
    wire_s: float = 0.0
    lane: str = ""
    downtime_s: float = 0.0
    """Last token from the source to first token from the destination."""
    added_stall_s: float = 0.0
    """Downtime less the request's median gap between tokens before it."""
    total_s: float = 0.0
    age_s: float = 0.0
    """Time since it ended, when this record was sent."""


class RequestRow(msgspec.Struct, omit_defaults=True, gc=False):
    """One request of a worker: running in its engine, or relayed from the worker that it has moved to.

    Not frozen: who follows a worker by differences brings its rows up to date in place.
    """

    number: int
    """Of the row on this worker; no other row ever has it."""
    request_id: RequestId
    phase: RequestPhase
    prompt_tokens: int
    output_tokens: int = 0
    kv_blocks: int = 0
    age_s: float = 0.0
    priority: int = 0
    max_tokens: int | None = None
    preemptions: int = 0
    not_migratable: str = ""
    """Why it cannot move; empty: it can."""
    life: Life = 0
    relayed_from: str = ""
    """Name of the worker whose tokens are passed on; the engine here has nothing of this request any more."""
    attached: bool = True
    """False: nobody reads its tokens at the moment; the frontend's repeat is awaited."""
    moving: bool = False
    moves: int = 0


class RowCount(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What changes with every step of a request, for one whose row the caller has."""

    number: int
    output_tokens: int
    kv_blocks: int


class WorkerState(msgspec.Struct, frozen=True, omit_defaults=True):
    """A worker's own view of itself, or what has changed in it since the version that the caller has.

    Rows come in pages. A caller keeps the ``version`` of the first one, and asks on with ``after`` while ``next`` is
    not 0.
    """

    worker: str
    role: str
    stats: EngineStats
    info: EngineInfo | None = None
    """Only to callers that have no version yet. Of the epochs of its agents, the first eight digits."""
    version: int = 0
    whole: bool = False
    """``rows`` begin anew: what the caller has of this worker is to be forgotten."""
    rows: tuple[RequestRow, ...] = ()
    counts: tuple[RowCount, ...] = ()
    gone: tuple[int, ...] = ()
    next: int = 0
    age_s: float = 0.0
    """Time since the engine has told its load and its table."""
    moves: tuple[MoveRecord, ...] = ()
    moves_total: int = 0
    cordoned: bool = False
    draining: bool = False
    tokens_total: int = 0
    handoffs: dict[str, int] = {}
    """How requests went from prefill to decode workers, by outcome; see ``components.worker.handoff``."""
    metrics: str = ""
    """host:port of the worker's Prometheus metrics."""


class WorkerReply(msgspec.Struct, frozen=True, omit_defaults=True):
    """Answer to a call; ``error`` is (code, message)."""

    error: tuple[str, str] | None = None
    landing: LandingStatus | None = None
    state: WorkerState | None = None
    moves: tuple[MoveRecord, ...] = ()
    left: int = 0
    """``drain``: requests that still run here."""


class Attached(msgspec.Struct, frozen=True, omit_defaults=True):
    """One item of an ``attach`` stream: tokens, the request's next owner, or an error. The first one is empty."""

    outputs: tuple[GenerateOutput, ...] = ()
    moved: Owner | None = None
    error: tuple[str, str] | None = None


class Verdict(StrEnum):
    """What a planner made of something."""

    MOVE = "move"
    RETIRE = "retire"
    LEAVE = "leave"


class Decision(msgspec.Struct, frozen=True, omit_defaults=True):
    """One decision of a planner, with its reason, for people to read."""

    policy: str
    verdict: Verdict
    reason: str
    request_id: str = ""
    source: str = ""
    target: str = ""
    age_s: float = 0.0
    """Time since it was made, when this was sent."""


class PlannerReply(msgspec.Struct, frozen=True):
    """What a planner answers on its endpoint ``decisions``."""

    decisions: Annotated[tuple[Decision, ...], msgspec.Meta(max_length=256)] = ()
