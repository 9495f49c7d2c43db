# SPDX-License-Identifier: Apache-2.0
"""Messages between workers, and from planners and the command line to workers.

One endpoint, ``<namespace>.<component>.migrate``, answers every ``WorkerCall`` with one ``WorkerReply``.
``components.messages`` packs, bounds and seals them. Workers send each other the same calls over links of their own
(``components.migration.links``), which also have ``attach`` and ``detach``.

A call names a *life* of a request: each stay of a request in an engine has a random number, and a call with another
number is refused. A late, doubled or crossed call therefore never reaches the next life.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import Annotated, Literal

import msgspec

from components.engine.kv import Frozen, KVOffer, LandingStatus, RequestId, SocketRef
from components.engine.protocol import EngineInfo, EngineStats, GenerateOutput, RequestPhase, TokenLogprob

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
Life = int
"""Number of one stay of a request in one engine (63 random bits)."""


class Mode(StrEnum):
    """Way of moving a request. ``REPLAY`` recomputes its KV, like Dynamo's own migration."""

    LIVE = "live"
    STOP_AND_COPY = "stop-and-copy"
    REPLAY = "replay"


class Owner(msgspec.Struct, frozen=True):
    """Place of a request: the instance id of a worker, and the number of the life there."""

    instance: int
    life: Life
    prompt_tokens: int = 0
    """Length of the client's prompt in a repeated request; the rest is the answer so far."""
    tried: tuple[int, ...] = ()
    """Workers to which the frontend has sent the request, which do not get it again."""
    order: tuple[int, ...] = ()
    """Numbers of the attempts to move it that led here, one for each life. An attempt of a source that has taken a
    request back is later than everything that followed from its earlier attempts."""

    def repeated_by(self, token_ids: Sequence[int]) -> bool:
        """Whether these tokens can be a repeat's. Clients choose ids: one with the prompt alone is another request."""
        return len(token_ids) > self.prompt_tokens


class Ticket(msgspec.Struct, frozen=True, omit_defaults=True):
    """Everything with which another worker continues a request, except its KV and its tokens at the freeze."""

    request_id: RequestId
    life: Life
    """Number of the new life at the receiver."""
    prompt_token_ids: tuple[int, ...]
    native: bytes
    """The request in the engine's form, readable for engines with an equal fingerprint."""
    fingerprint: str
    output_token_ids: tuple[int, ...] = ()
    tried: tuple[int, ...] = ()
    """As in ``Owner``."""
    max_tokens: int | None = None
    attached: str = ""
    """Why the frontend does not repeat this request, which must be relayed to its end; empty: it does."""
    trace: dict[str, str] = {}
    """W3C headers of the trace that the request belongs to."""
    order: tuple[int, ...] = ()
    """As in ``Owner``."""


class Handover(msgspec.Struct, frozen=True, omit_defaults=True):
    """A prefill worker's answer about a request, by way of the frontend: the loan of its blocks, or its owner."""

    owner: Owner | None = None
    fingerprint: str = ""
    adapter: str = ""
    """Digest of its LoRA adapter; empty: none or unknown."""
    instance: int = 0
    frozen: Frozen | None = None
    """The KV of the prompt, and the first token."""
    stops: bool = False
    """The first token ends the answer."""
    captured: bool = False
    """The engine returns data with each token that cannot be passed on (routed experts, sampling masks)."""
    logprobs: tuple[TokenLogprob, ...] = ()


class WorkerOp(StrEnum):
    """Calls that a worker's ``migrate`` endpoint answers."""

    RELEASE = "release"
    """Free blocks that a prefill worker lends under the offer's request id."""
    RESERVE = "reserve"
    LANDING = "landing"
    EXTEND = "extend"
    EXPECT_COMMIT = "expect-commit"
    COMMIT = "commit"
    ABORT = "abort"
    LINK = "link"
    """Where the worker takes links."""
    ATTACH = "attach"
    """Read a life."""
    DETACH = "detach"
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
    """``expect-commit``: time in which to begin no step. ``landing``, ``extend``: longest wait for the blocks."""
    index: int = 0
    """``attach``: output token to begin with; -1: the first one made there."""
    owners: Annotated[tuple[tuple[RequestId, Owner], ...], msgspec.Meta(max_length=65536)] = ()
    suspects: Annotated[tuple[RequestId, ...], msgspec.Meta(max_length=65536)] = ()
    target: int = 0
    """``migrate``: instance id of the destination; 0 lets the worker choose."""
    mode: Mode = Mode.LIVE
    timeout_s: float = 60.0
    requests: bool = True
    """``status``: with the table of requests."""
    since: int = 0
    """``status``: the caller's version; 0: none."""
    moves_since: int = 0
    """``status``: number of this worker's moves that the caller knows."""
    after: int = 0
    """``status``: last row of the previous page."""


class MoveRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """One ended migration, from its source. Times in seconds."""

    request_id: str
    source: str
    target: str
    mode: Mode
    ok: bool
    code: str = ""
    """``components.errors`` code of the failure; empty: none."""
    reason: str = ""
    """Why it failed, or why the mode is not the requested one."""
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
    """Time between its end and the sending of this record."""


class RequestRow(msgspec.Struct, omit_defaults=True, gc=False):
    """One request of a worker: running in its engine, or relayed from its next worker.

    Not frozen: callers that follow a worker by differences update rows in place.
    """

    number: Count
    """Number of the row, unique on this worker."""
    request_id: RequestId
    phase: RequestPhase
    prompt_tokens: Count
    output_tokens: Count = 0
    kv_blocks: Count = 0
    age_s: float = 0.0
    priority: int = 0
    max_tokens: int | None = None
    preemptions: int = 0
    not_migratable: str = ""
    """Why it cannot move; empty: it can."""
    life: Life = 0
    relayed_from: str = ""
    """Worker from which tokens are relayed; this worker's engine no longer has the request."""
    attached: bool = True
    """False: its tokens have no reader now; the frontend's repeat is expected."""
    moving: bool = False
    moves: int = 0


class Column(msgspec.Struct, frozen=True, array_like=True):
    """Numbers as little-endian differences to the lowest one, each of ``width`` bytes."""

    lowest: Count = 0
    width: Literal[1, 2, 4, 8] = 1
    data: bytes = b""

    @staticmethod
    def of(values: Sequence[int]) -> Column:
        """Pack them as narrow as they are close together."""
        lowest, highest = min(values, default=0), max(values, default=0)
        width = next(w for w in _WIDTHS if highest - lowest < 1 << 8 * w)
        packed = struct.pack(f"<{len(values)}{_WIDTHS[width]}", *(value - lowest for value in values))
        return Column(lowest, width, packed)

    def __len__(self) -> int:
        return len(self.data) // self.width

    def __iter__(self) -> Iterator[int]:
        return (self.lowest + value for (value,) in struct.iter_unpack("<" + _WIDTHS[self.width], self.data))


_WIDTHS: dict[Literal[1, 2, 4, 8], str] = {1: "B", 2: "H", 4: "I", 8: "Q"}
"""Of numbers in bytes, and their names in ``struct``."""


class Counts(msgspec.Struct, frozen=True, array_like=True):
    """The fields that change with every step, for known rows."""

    numbers: Column = Column()
    output_tokens: Column = Column()
    kv_blocks: Column = Column()

    def __post_init__(self) -> None:
        count = len(self.numbers)
        columns = (self.numbers, self.output_tokens, self.kv_blocks)
        if [len(column.data) for column in columns] != [count * column.width for column in columns]:
            raise ValueError("columns of counts have different lengths")

    @staticmethod
    def of(rows: Sequence[tuple[int, int, int]]) -> Counts:
        """Pack (number, output tokens, KV blocks) of each row."""
        return Counts(*map(Column.of, zip(*rows, strict=True)))

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        return zip(self.numbers, self.output_tokens, self.kv_blocks, strict=True)


class WorkerState(msgspec.Struct, frozen=True, omit_defaults=True):
    """A worker's state, or its changes since the caller's version.

    Rows come in pages. A caller keeps the ``version`` of the first page, and continues with ``after`` while ``next``
    is not 0.
    """

    worker: str
    role: str
    stats: EngineStats
    info: EngineInfo | None = None
    """Only for callers without a version. Epochs of agents are shortened to eight digits."""
    version: int = 0
    whole: bool = False
    """``rows`` are complete: the caller drops its older rows of this worker."""
    rows: tuple[RequestRow, ...] = ()
    counts: Counts = Counts()
    gone: tuple[int, ...] = ()
    next: int = 0
    age_s: float = 0.0
    """Age of the engine's load and table."""
    moves: tuple[MoveRecord, ...] = ()
    moves_total: int = 0
    cordoned: bool = False
    draining: bool = False
    tokens_total: int = 0
    handoffs: dict[str, int] = {}
    """Hand-offs from prefill to decode workers by outcome; see ``components.worker.handoff``."""
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
    link: SocketRef | None = None
    """Where the worker takes links."""


class Attached(msgspec.Struct, frozen=True, omit_defaults=True):
    """One item for a reader: tokens, the request's next owner, or an error. The first one is empty."""

    outputs: tuple[GenerateOutput, ...] = ()
    moved: Owner | None = None
    error: tuple[str, str] | None = None
    end: bool = False
    """Nothing follows."""


class Verdict(StrEnum):
    """Kind of a planner's decision."""

    MOVE = "move"
    RETIRE = "retire"
    LEAVE = "leave"


class Decision(msgspec.Struct, frozen=True, omit_defaults=True):
    """One decision of a planner with its reason, for people."""

    policy: str
    verdict: Verdict
    reason: str
    request_id: str = ""
    source: str = ""
    target: str = ""
    age_s: float = 0.0
    """Time between the decision and the sending of this."""


class PlannerReply(msgspec.Struct, frozen=True):
    """Answer of a planner's endpoint ``decisions``."""

    decisions: Annotated[tuple[Decision, ...], msgspec.Meta(max_length=256)] = ()
