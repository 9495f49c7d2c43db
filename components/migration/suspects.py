# SPDX-License-Identifier: Apache-2.0
"""Requests that were in flight when an engine died, so that none of them ends one worker after the other.

A worker survives its engine for a moment: it reports its requests to all others, and only then ends their streams.
A request is repeated after the first death and ends with an error after the second. A worker that is killed together
with its engine reports nothing: its requests are not counted.

Counts end ``KEPT_S`` after the last death. Nothing is sent while no engine dies. Threading: one asyncio loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable

from components.engine.kv import RequestId
from components.engine.protocol import GenerateOutput
from components.errors import EngineKiller, WorkerLost
from components.migration.messages import WorkerCall, WorkerOp
from components.migration.peers import Peers, tell_others

KEPT_S = 120.0
_TELL_S = 1.0
_MOST = 2
"""Deaths of its engine after which a request is given up."""


class Suspects:
    """See the module docstring."""

    def __init__(self, peers: Peers, instance: int, in_flight: Callable[[], Iterable[RequestId]]) -> None:
        """``in_flight`` returns the requests in this worker's engine."""
        self._peers = peers
        self._instance = instance
        self._in_flight = in_flight
        self._told: asyncio.Future[None] | None = None
        self._deaths: dict[RequestId, tuple[int, float]] = {}

    def learn(self, request_ids: Iterable[RequestId]) -> None:
        """Count the death of an engine with these requests."""
        until = time.monotonic() + KEPT_S
        self._deaths.update({request_id: (self._count(request_id) + 1, until) for request_id in request_ids})

    def _count(self, request_id: RequestId) -> int:
        count, until = self._deaths.get(request_id, (0, 0.0))
        return count if until > time.monotonic() else 0

    def require_few(self, request_id: RequestId) -> None:
        """Raise ``EngineKiller`` for a request that must not enter another engine."""
        if (count := self._count(request_id)) >= _MOST:
            raise EngineKiller(
                f"request {request_id} was in flight when {count} engines died: it is not repeated any more"
            )

    def sweep(self) -> None:
        """Drop old counts."""
        now = time.monotonic()
        self._deaths = {key: value for key, value in self._deaths.items() if value[1] > now}

    async def watched(self, stream: AsyncIterator[GenerateOutput]) -> AsyncGenerator[GenerateOutput, None]:
        """An engine's outputs. At its death the other workers are informed first."""
        async for output in stream:
            if output.error is not None and output.error[0] == WorkerLost.code:
                await self.engine_died()
            yield output

    async def engine_died(self) -> None:
        """Report the engine's requests to the other workers. Returns after their answers or the time-out."""
        if self._told is None:
            self._told = asyncio.ensure_future(self._tell(tuple(dict.fromkeys(self._in_flight()))))
        await asyncio.shield(self._told)

    async def _tell(self, request_ids: tuple[RequestId, ...]) -> None:
        self.learn(request_ids)
        call = WorkerCall(WorkerOp.SUSPECTS, suspects=request_ids)
        await tell_others(self._peers, self._instance, call, _TELL_S, "that this engine has died")
