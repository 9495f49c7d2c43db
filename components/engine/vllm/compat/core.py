# SPDX-License-Identifier: Apache-2.0
"""The call ``kv_control``, which this package adds to vLLM's engine core.

vLLM runs utility calls between two steps, one after the other. Freezing and committing need that atomicity, but vLLM
has no such call for connectors. ``install`` adds one method to ``EngineCore`` and changes none. It runs when
``components.engine.vllm.scheduler`` is imported, so only in engine cores with a ``scheduler_cls`` of this package.

Errors of this package travel as (code, message) in the reply; vLLM reports any other error.
"""

from __future__ import annotations

import queue
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING

from components.engine.vllm.control import Call, Op, Reply, decode_call, encode
from components.errors import MigrateError
from components.timeline import mark

if TYPE_CHECKING:
    from vllm.v1.engine.core import EngineCoreProc

    from components.engine.vllm.migration import Migration

MAX_HOLD_S = 0.25
"""Upper bound on one pause of the engine for a commit, whatever a call asks for."""


class Hold:
    """Pauses the engine core until an expected commit arrives.

    Pauses neither nest nor follow each other closely: a call during a pause does not prolong it, and between two
    pauses the engine runs for at least the bound of the next one. So any number of commits pauses it at most half
    of the time.
    """

    def __init__(self) -> None:
        self._holding = False
        self._ended = float("-inf")

    def until_commit(self, core: EngineCoreProc, call: Call) -> None:
        """Process messages of clients but begin no step, until the commit is here or the time is over."""
        now = time.monotonic()
        limit = min(call.hold_s, MAX_HOLD_S, now - self._ended)
        if self._holding:
            return
        self._holding = True
        migration = _migration(core)
        mark("target-core", "hold", call.request_id)
        try:
            while True:
                # A commit may be among them whose wake-up has already left the queue.
                migration.take_commits()
                if not migration.expects_commit(call.request_id) or (left := now + limit - time.monotonic()) <= 0:
                    return
                try:
                    request = core.input_queue.get(timeout=left)
                except queue.Empty:
                    return
                core._handle_client_request(*request)
        finally:
            mark("target-core", "hold ended", call.request_id)
            self._holding = False
            self._ended = time.monotonic()


def _migration(core: EngineCoreProc) -> Migration:
    return core.scheduler.migration  # type: ignore[attr-defined, no-any-return]


def _take_commits(core: EngineCoreProc) -> None:
    """Accept direct commits. Each wakes the core; a utility call would answer a client that has not asked."""
    from vllm.v1.engine import EngineCoreRequestType

    _migration(core).incoming.inbox.listen(lambda: core.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None)))


_hold = Hold()


def kv_control(core: EngineCoreProc, data: bytes) -> bytes | Future[bytes]:
    """Added to ``EngineCore``: one call into ``Migration``, between two steps."""
    call = decode_call(data)
    if call.op is Op.INFO:
        _take_commits(core)
    if call.op is Op.EXPECT_COMMIT:
        _hold.until_commit(core, call)
        return encode(Reply())
    try:
        result = _migration(core).control(call, core.model_executor)
    except MigrateError as error:
        return _reply_of(error)
    if isinstance(result, Reply):
        return encode(result)
    answer: Future[bytes] = Future()

    def settle(done: Future[Reply]) -> None:
        error = done.exception()
        if error is None:
            answer.set_result(encode(done.result()))
        elif isinstance(error, MigrateError):
            answer.set_result(_reply_of(error))
        else:
            answer.set_exception(error)

    result.add_done_callback(settle)
    return answer


def _reply_of(error: MigrateError) -> bytes:
    return encode(Reply(error=(error.code, str(error))))


def install() -> None:
    """Make ``kv_control`` callable on the engine core of this process. Idempotent."""
    from vllm.v1.engine.core import EngineCore

    EngineCore.kv_control = kv_control  # type: ignore[attr-defined]
