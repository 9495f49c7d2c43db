# SPDX-License-Identifier: Apache-2.0
"""A vLLM scheduler with a request that waits for its commit: whatever a peer says, the engine goes on, the request runs
or still waits, and no block is lost.

No model runs; what it would get is checked instead.
"""

from __future__ import annotations

import struct
from contextlib import suppress
from functools import cache
from typing import Any
from unittest import mock

import msgspec

from components.errors import MigrateError
from components.models import resolve
from tests.fuzz.inputs import Target
from tests.fuzz.samples import LANDED, R
from tests.fuzz.wire import client

_STEPS = 8
"""Steps within which a committed request must have run."""


@cache
def _played() -> Any:
    from tests.vllm_scheduler import Played

    return Played(resolve("tiny-llama"))


def commits(data: bytes) -> None:
    """What a peer that has proved itself sends to an engine core; then its worker sends the same, and its prefill
    worker lends it.
    """
    from components.engine.vllm import migration as module
    from components.engine.vllm.control import Call, Marker
    from tests.vllm_scheduler import offer_of

    played = _played()
    migration, free = played.scheduler.migration, played.free
    request = played.add([*LANDED, 7], Marker(R, len(LANDED), landing=offer_of(R, len(LANDED))), R)
    played.step(played.done(*played.jobs(played.step())))
    # Messages of the corpus name this life as "life".
    data = data.replace(b"\xa4life", msgspec.msgpack.encode(request.request_id))
    try:
        with client(struct.pack("!I", len(data)) + data) as connection, suppress(OSError):
            migration.incoming.inbox._serve(connection)
        with mock.patch.object(module.logger, "exception", _raise):
            migration.take_commits()
        _play(played, request)
        call = msgspec.msgpack.decode(data, type=Call)
        with suppress(MigrateError):
            migration.control(call, played.executor)
        _play(played, request)
        if call.frozen is not None:
            _end(played, request)
            request = played.add([*LANDED, 7], Marker(R, len(LANDED), landing=call.frozen.offer), R)
            _play(played, request)
            _end(played, request)
            request = played.add([*LANDED, 7], Marker(R, len(LANDED), handoff=call.frozen), R)
            _play(played, request)
    finally:
        migration.take_commits()
        _end(played, request)
        played.check()
        if played.free != free:
            raise AssertionError(f"{free - played.free} blocks are left")


def _end(played: Any, request: Any) -> None:
    from vllm.v1.request import RequestStatus

    played.scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)
    _steps(played)


def _raise(*_: Any) -> None:
    raise  # noqa: PLE0704


def _steps(played: Any) -> set[str]:
    """Steps to the end of all copies; the requests that were in them."""
    ran, results = set[str](), None
    for _ in range(_STEPS):
        output = played.step(results)
        results = played.done(*played.jobs(output))
        ran |= set(output.num_scheduled_tokens)
    return ran


def _play(played: Any, request: Any) -> None:
    migration, size = played.scheduler.migration, played.config.model_config.get_vocab_size()
    ran = _steps(played)
    unknown = [token for token in request.output_token_ids if not 0 <= token < size]
    if unknown:
        raise AssertionError(f"the model would get the tokens {unknown[:8]}")
    record = migration.find(request.request_id)
    if record is not None and not migration.incoming.holds(record) and request.request_id not in ran:
        raise AssertionError(f"a committed request has not run: {record}")


TARGETS = [Target("commit", commits)]
