# SPDX-License-Identifier: Apache-2.0
"""What router, workers and command line say to each other over Dynamo's endpoints.

Dynamo carries JSON-like values; each message is one msgspec struct, as base64 msgpack under ``m``, so that
bytes, ids and unknown fields are checked in one place. Nothing larger than ``MAX_BYTES`` is decoded. With a shared
secret (``components.credentials``) each also carries its seal under ``s``.
"""

from __future__ import annotations

import base64
import binascii
from enum import StrEnum
from typing import Annotated, Any, TypeVar

import msgspec

from components import credentials
from components.engine.protocol import (
    EngineInfo,
    EngineStats,
    Frozen,
    GenerateOutput,
    GenerateRequest,
    KVOffer,
    LandingStatus,
    RequestId,
    RequestInfo,
)
from components.errors import InvalidRequest, Unauthorized
from components.wire import UNREADABLE

MAX_BYTES = 64 << 20


class WorkerOp(StrEnum):
    """Calls that a worker's ``control`` endpoint answers."""

    INFO = "info"
    OFFER = "offer"
    FREEZE = "freeze"
    RESUME = "resume"
    RELEASE = "release"
    ABORT = "abort"
    LANDING = "landing"
    EXTEND = "extend"
    EXPECT_COMMIT = "expect-commit"
    COMMIT = "commit"
    CHECK = "check"
    BUSY = "busy"


class Generate(msgspec.Struct, frozen=True, omit_defaults=True):
    """Start a request on a worker; with ``frozen`` it is committed at once."""

    request: GenerateRequest
    frozen: Frozen | None = None
    channel: str = ""
    """Connection of the router's own on which it wants the outputs; empty for the answer's stream."""
    leg: int = 0
    """Number of the request on that connection."""


class Hello(msgspec.Struct, frozen=True):
    """The first message of a router on a connection for outputs; the channel's name is its own choice."""

    channel: Annotated[str, msgspec.Meta(min_length=16, max_length=64)]


class Batch(msgspec.Struct, frozen=True):
    """Outputs of many requests, in the order in which the engine gave them. An empty one answers ``Hello``."""

    outputs: tuple[tuple[int, GenerateOutput], ...]


class WorkerCall(msgspec.Struct, frozen=True, omit_defaults=True):
    """One call to a worker."""

    op: WorkerOp
    request_id: RequestId = RequestId("")
    offer: KVOffer | None = None
    tokens: tuple[int, ...] = ()
    frozen: Frozen | None = None
    hold_s: float = 0.0
    """``expect-commit``: for how long to begin no step. ``landing``: when to answer though blocks are on the way."""


class WorkerReply(msgspec.Struct, frozen=True, omit_defaults=True):
    """Its answer; ``error`` is (code, message)."""

    error: tuple[str, str] | None = None
    info: EngineInfo | None = None
    stats: EngineStats | None = None
    requests: tuple[RequestInfo, ...] = ()
    draining: bool = False
    metrics: str = ""
    """host:port of the worker's Prometheus metrics."""
    outputs: str = ""
    """host:port at which it gives the outputs of many requests over one connection."""
    offer: KVOffer | None = None
    frozen: Frozen | None = None
    landing: LandingStatus | None = None
    busy: bool = False
    """To ``busy``: its engine computes, whether or not it answers."""


class Mode(StrEnum):
    """How a request is moved; each falls back to the next."""

    LIVE = "live"
    STOP_AND_COPY = "stop-and-copy"
    REPLAY = "replay"


class RouterOp(StrEnum):
    """Calls that the router's ``control`` endpoint answers."""

    STATUS = "status"
    MIGRATE = "migrate"
    DRAIN = "drain"
    UNDRAIN = "undrain"
    REPORT = "report"


class Verdict(StrEnum):
    """What a planner made of something."""

    MOVE = "move"
    RETIRE = "retire"
    LEAVE = "leave"


class Decision(msgspec.Struct, frozen=True):
    """One decision of a planner, with its reason, for people to read."""

    at: float
    """Unix time."""
    policy: str
    verdict: Verdict
    reason: str
    request_id: str = ""
    source: str = ""
    target: str = ""


class RouterCall(msgspec.Struct, frozen=True, omit_defaults=True):
    """One call to the router. ``worker`` is an instance id in hexadecimal, or the start of one."""

    op: RouterOp
    request_id: str = ""
    worker: str = ""
    source: str = ""
    """A migration that was planned elsewhere only begins while the request is still on this worker."""
    mode: Mode = Mode.LIVE
    timeout_s: float = 60.0
    decisions: Annotated[tuple[Decision, ...], msgspec.Meta(max_length=200)] = ()
    """With ``REPORT``: what a planner has just decided."""


class MoveRecord(msgspec.Struct, frozen=True):
    """One migration that has ended. Times in seconds."""

    request_id: str
    source: str
    target: str
    mode: Mode
    ok: bool
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
    """Last token from the source to first token from the target."""
    added_stall_s: float = 0.0
    """Downtime less the request's median gap between tokens before it."""
    total_s: float = 0.0
    ended_at: float = 0.0
    """Unix time."""


class EventKind(StrEnum):
    """What happens to a request, in the order of a usual life."""

    ARRIVED = "arrived"
    PREFILL = "prefill"
    """It was given to a prefill worker."""
    DECODE = "decode"
    """It was given to a decode worker, which also computes its prompt."""
    COPYING = "copying"
    """Its blocks are being copied to a worker while the old one goes on."""
    FROZEN = "frozen"
    SWITCHED = "switched"
    """The worker owns it now."""
    STAYS = "stays"
    """The move failed, the old worker owns it again."""
    REPLAYED = "replayed"
    ENDED = "ended"


class StreamEvent(msgspec.Struct, frozen=True, gc=False):
    """One step in the life of a request; ``at`` is Unix time."""

    at: float
    kind: EventKind
    worker: str = ""


class StreamInfo(msgspec.Struct, frozen=True, gc=False):
    """One request as the router sees it. Part of no cycle: a hundred thousand of them are no garbage to look for."""

    request_id: str
    worker: str
    prompt_tokens: int
    output_tokens: int
    age_s: float
    moving: bool = False
    moves: int = 0
    replays: int = 0
    events: tuple[StreamEvent, ...] = ()


class WorkerInfo(msgspec.Struct, frozen=True):
    """One worker as the router sees it."""

    worker: str
    role: str
    draining: bool
    agents: tuple[str, ...] = ()
    epochs: tuple[str, ...] = ()
    """Their first eight digits: a whole epoch is what an agent's sockets ask for where there is no secret."""
    lanes: tuple[str, ...] = ()
    stats: EngineStats | None = None
    requests: tuple[RequestInfo, ...] = ()
    block_size: int = 0
    max_num_seqs: int = 0
    kv_bytes_per_token: int = 0
    report_age_s: float = 0.0
    """Time since the worker has last told its state."""
    tokens_total: int = 0
    """Tokens that this router has had from it."""
    metrics: str = ""
    """host:port of its Prometheus metrics."""


class RouterReply(msgspec.Struct, frozen=True):
    """The router's answer."""

    error: tuple[str, str] | None = None
    workers: tuple[WorkerInfo, ...] = ()
    streams: tuple[StreamInfo, ...] = ()
    moves: tuple[MoveRecord, ...] = ()
    ended: tuple[StreamInfo, ...] = ()
    """The last requests that are over."""
    decisions: tuple[Decision, ...] = ()
    """The planner's last moves, and what it leaves alone now."""
    metrics: tuple[str, ...] = ()
    """host:port of each router's Prometheus metrics."""


T = TypeVar("T", bound=msgspec.Struct)


def pack(message: msgspec.Struct) -> dict[str, str]:
    """A message as Dynamo carries it. Raises ``ConfigError`` when the configured secret cannot be read."""
    data = msgspec.msgpack.encode(message)
    sealed = credentials.seal(type(message).__name__, data)
    return {"m": base64.b64encode(data).decode()} | ({"s": sealed} if sealed else {})


def unpack(payload: Any, kind: type[T]) -> T:
    """Read a message. Raises ``InvalidRequest`` on anything malformed or too large, ``Unauthorized``."""
    text = payload.get("m") if isinstance(payload, dict) else None
    if not isinstance(text, str) or len(text) > MAX_BYTES:
        raise InvalidRequest(f"not a {kind.__name__} message")
    try:
        data = base64.b64decode(text, validate=True)
        if not credentials.accepts(kind.__name__, data, payload.get("s")):
            raise Unauthorized(f"a {kind.__name__} message without the seal of the secret in {credentials.VARIABLE}")
        return msgspec.msgpack.decode(data, type=kind)
    except (binascii.Error, *UNREADABLE) as error:
        raise InvalidRequest(f"not a {kind.__name__} message: {error}") from error
