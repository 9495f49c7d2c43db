# SPDX-License-Identifier: Apache-2.0
"""Messages between ``VLLMEngine`` and the engine core, and the call that carries them.

The engine core runs utility calls between two steps of its loop, one after the other, which is
exactly the atomicity that freezing and committing need. ``install`` adds one such call, ``kv_control``,
to the engine core's class; everything it does is in the scheduler.

Errors of this package travel as (code, message) in the reply, so that the caller raises the same class.
"""

from __future__ import annotations

import queue
import time
from concurrent.futures import Future
from enum import StrEnum
from typing import Any

import msgspec

from components.engine.protocol import (
    AgentRef,
    EngineStats,
    Frozen,
    KVOffer,
    LandingStatus,
    RequestId,
    RequestInfo,
)
from components.errors import MigrateError, from_code

MARKER = "dynamo_migrate"
"""Key under ``kv_transfer_params`` that carries a ``Marker`` into and a ``Frozen`` out of the core."""


MAX_HOLD_S = 0.25
"""Longest time for which an engine stands still for a commit, whatever it is asked for."""


class Marker(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the scheduler must know of a request besides what vLLM tells it."""

    request_id: RequestId
    num_prompt_tokens: int
    """Tokens beyond these in vLLM's prompt were generated before the request came here."""
    freeze_after: int | None = None
    landing: KVOffer | None = None
    not_migratable: str | None = None


class Op(StrEnum):
    """Calls into the scheduler."""

    INFO = "info"
    OFFER = "offer"
    FREEZE = "freeze"
    RESUME = "resume"
    LANDING = "landing"
    EXTEND = "extend"
    EXPECT_COMMIT = "expect-commit"
    COMMIT = "commit"
    REPORT = "report"
    CHECK = "check"


class Call(msgspec.Struct, frozen=True, omit_defaults=True):
    """Arguments of one call; which fields matter depends on ``op``."""

    op: Op
    request_id: RequestId = RequestId("")
    offer: KVOffer | None = None
    tokens: tuple[int, ...] = ()
    frozen: Frozen | None = None
    hold_s: float = 0.0


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """Result of one call, or the error it raised."""

    error: tuple[str, str] | None = None
    agents: tuple[AgentRef, ...] = ()
    lanes: tuple[str, ...] = ()
    num_blocks: int = 0
    kv_bytes_per_token: int = 0
    fingerprint: str = ""
    offer: KVOffer | None = None
    frozen: Frozen | None = None
    landing: LandingStatus | None = None
    requests: tuple[RequestInfo, ...] = ()
    stats: EngineStats | None = None


_encoder = msgspec.msgpack.Encoder()
_call_decoder = msgspec.msgpack.Decoder(Call)
_reply_decoder = msgspec.msgpack.Decoder(Reply)
_marker_decoder = msgspec.msgpack.Decoder(Marker)
_frozen_decoder = msgspec.msgpack.Decoder(Frozen)


def encode(message: msgspec.Struct) -> bytes:
    """Any message of this module as msgpack."""
    return _encoder.encode(message)


def decode_marker(data: bytes) -> Marker:
    """The marker of a request."""
    return _marker_decoder.decode(data)


def decode_frozen(data: bytes) -> Frozen:
    """The frozen state that came with an output."""
    return _frozen_decoder.decode(data)


def decode_reply(data: bytes) -> Reply:
    """The reply to a call; raises the error that it carries."""
    reply = _reply_decoder.decode(data)
    if reply.error is not None:
        raise from_code(*reply.error)
    return reply


def _reply_of_error(error: MigrateError) -> bytes:
    return encode(Reply(error=(error.code, str(error))))


def _kv_control(self: Any, data: bytes) -> bytes | Future[bytes]:
    """Added to vLLM's ``EngineCore``: runs one call in the scheduler, between two steps."""
    call = _call_decoder.decode(data)
    if call.op is Op.EXPECT_COMMIT:
        _hold(self, call)
        return encode(Reply())
    try:
        result = self.scheduler.control(call, self.model_executor)
    except MigrateError as error:
        return _reply_of_error(error)
    if isinstance(result, Reply):
        return encode(result)
    answer: Future[bytes] = Future()

    def settle(done: Future[Reply]) -> None:
        error = done.exception()
        if error is None:
            answer.set_result(encode(done.result()))
        elif isinstance(error, MigrateError):
            answer.set_result(_reply_of_error(error))
        else:
            answer.set_exception(error)

    result.add_done_callback(settle)
    return answer


def _hold(core: Any, call: Call) -> None:
    """Take in what clients send, and begin no step, until the expected commit is here or its time is over."""
    end = time.monotonic() + min(call.hold_s, MAX_HOLD_S)
    while core.scheduler.expects_commit(call.request_id) and (left := end - time.monotonic()) > 0:
        try:
            request = core.input_queue.get(timeout=left)
        except queue.Empty:
            return
        core._handle_client_request(*request)


def install() -> None:
    """Make ``kv_control`` callable on the engine core of this process. Idempotent."""
    from vllm.v1.engine.core import EngineCore

    EngineCore.kv_control = _kv_control
