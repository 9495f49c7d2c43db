# SPDX-License-Identifier: Apache-2.0
"""Messages between ``VLLMEngine`` and the engine core; the call that carries them is in ``compat/core.py``.

Errors of this package travel as (code, message) in the reply, so that the caller raises the same class.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from components.engine.kv import CommitTo, Frozen, KVOffer, LandingStatus, RequestId
from components.engine.protocol import EngineInfo, EngineStats, RequestInfo
from components.errors import from_code

MARKER = "dynamo_migrate"
"""Key under ``kv_transfer_params`` that carries a ``Marker`` into and a ``Lent`` out of the core."""


COMMITTED = "dynamo_migrate_committed"
"""Key under ``kv_transfer_params`` of the first outputs of a landing that the source's engine has committed; its tokens
until then, encoded: vLLM would encode each token separately, for each output."""


class Marker(msgspec.Struct, frozen=True, omit_defaults=True):
    """Facts about a request that vLLM does not pass to the scheduler. A request without marker is new."""

    request_id: RequestId
    num_prompt_tokens: int | None = None
    """Length of the prompt; further tokens in vLLM's prompt are output of another worker."""
    landing: KVOffer | None = None
    lend: bool = False
    """End with the first token and keep the blocks for a decode engine."""
    handoff: Frozen | None = None
    """The KV of the prompt, lent by a prefill engine."""


class Lent(msgspec.Struct, frozen=True, omit_defaults=True):
    """A prefill engine's description of a lent request, beside its last output."""

    frozen: Frozen
    """``offer.request_id`` is vLLM's id at the prefill engine, which ``Op.RELEASE`` names."""
    stops: bool = False
    """The first token ends the answer."""


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
    RELEASE = "release"
    REPORT = "report"
    CHECK = "check"


class Call(msgspec.Struct, frozen=True, omit_defaults=True):
    """Arguments of one call; ``op`` determines the fields in use."""

    op: Op
    request_id: RequestId = RequestId("")
    """The caller's id, or vLLM's internal one, which names one life of the request."""
    offer: KVOffer | None = None
    tokens: tuple[int, ...] = ()
    frozen: Frozen | None = None
    hold_s: float = 0.0
    commit_to: CommitTo | None = None
    use_within_s: float = 0.0
    expired: bool = False


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """Result of one call, or the error it raised."""

    error: tuple[str, str] | None = None
    info: EngineInfo | None = None
    offer: KVOffer | None = None
    frozen: Frozen | None = None
    landing: LandingStatus | None = None
    requests: tuple[RequestInfo, ...] = ()
    stats: EngineStats | None = None


encode = msgspec.msgpack.Encoder().encode
decode_call = msgspec.msgpack.Decoder(Call).decode
decode_marker = msgspec.msgpack.Decoder(Marker).decode
decode_tokens = msgspec.msgpack.Decoder(tuple[int, ...]).decode
decode_lent = msgspec.msgpack.Decoder(Lent).decode
_decode_reply = msgspec.msgpack.Decoder(Reply).decode


def decode_reply(data: bytes) -> Reply:
    """The reply to a call; raises its error."""
    reply = _decode_reply(data)
    if reply.error is not None:
        raise from_code(*reply.error)
    return reply
