# SPDX-License-Identifier: Apache-2.0
"""Calls to the routers of a namespace, for the command line and the planner.

Each router owns its own streams: status is the sum of all, a migration goes to the one that has the request,
a drain to all. Raises ``WorkerLost`` when no router answers, otherwise what the router raised.
"""

from __future__ import annotations

from typing import Any

from components import process
from components.errors import MigrateError, RequestNotFound, WorkerLost, from_code
from components.messages import Decision, Mode, MoveRecord, RouterCall, RouterOp, RouterReply, pack, unpack


class RouterClient:
    """Connects with ``connect``; safe to use for many calls."""

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime
        self._client: Any = None

    async def connect(self) -> None:
        """Find the routers."""
        endpoint = self._runtime.endpoint(f"{process.edge_namespace()}.router.control")
        self._client = await endpoint.client()
        await self._client.wait_for_instances()

    async def _all(self, call: RouterCall) -> list[RouterReply]:
        replies, why = [], ""
        for instance in self._client.instance_ids():
            try:
                stream = await self._client.direct(pack(call), instance, annotated=False)
                async for item in stream:
                    replies.append(unpack(item, RouterReply))
            except MigrateError:
                raise
            except Exception as error:
                # Dynamo raises plain exceptions. One that has died stays listed for its lease; ask the others.
                why = f": {error}"
        if not replies:
            raise WorkerLost(f"no router answers in namespace {process.edge_namespace()}{why}")
        return replies

    async def status(self) -> RouterReply:
        """Workers, streams and recent migrations of all routers."""
        replies = await self._all(RouterCall(RouterOp.STATUS))
        return RouterReply(
            workers=replies[0].workers,
            streams=tuple(s for r in replies for s in r.streams),
            moves=tuple(m for r in replies for m in r.moves),
            ended=tuple(s for r in replies for s in r.ended),
            decisions=tuple(d for r in replies for d in r.decisions),
            metrics=tuple(m for r in replies for m in r.metrics),
        )

    async def report(self, decisions: tuple[Decision, ...]) -> None:
        """Tell one router what a planner has just decided, so that people can see it."""
        for instance in self._client.instance_ids()[:1]:
            call = RouterCall(RouterOp.REPORT, decisions=decisions)
            async for _ in await self._client.direct(pack(call), instance, annotated=False):
                pass

    async def migrate(self, request_id: str, worker: str, mode: Mode = Mode.LIVE, source: str = "") -> MoveRecord:
        """Move one request; with ``source`` only while it is there."""
        error: MigrateError = RequestNotFound(f"no request {request_id!r} is running")
        for reply in await self._all(RouterCall(RouterOp.MIGRATE, request_id, worker, source, mode)):
            if reply.moves:
                return reply.moves[0]
            if reply.error is not None:
                error = from_code(*reply.error)
        raise error

    async def drain(self, worker: str, timeout_s: float = 60.0) -> list[MoveRecord]:
        """Empty a worker; it gets no new requests until ``undrain``."""
        moves: list[MoveRecord] = []
        for reply in await self._all(RouterCall(RouterOp.DRAIN, worker=worker, timeout_s=timeout_s)):
            if reply.error is not None:
                raise from_code(*reply.error)
            moves += reply.moves
        return moves

    async def undrain(self, worker: str) -> None:
        """Let a worker have new requests again."""
        for reply in await self._all(RouterCall(RouterOp.UNDRAIN, worker=worker)):
            if reply.error is not None:
                raise from_code(*reply.error)
