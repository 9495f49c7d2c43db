# SPDX-License-Identifier: Apache-2.0
"""Records of the workers that own requests which the frontend may repeat.

Before a stream breaks, each worker that the frontend could choose gets the announcement and answers it; one call
announces all waiting requests. This needs only Dynamo's request plane, and the answers prove that the record is there
before the repeat. A worker that does not answer has no record: a repeat is a new request there, as after the loss of a
worker. Records end after ``OWNER_S``.

Threading: one asyncio loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Sequence

from components.engine.kv import RequestId
from components.migration.legs import Away
from components.migration.messages import Owner, WorkerCall, WorkerOp
from components.migration.peers import Peers, tell_others

OWNER_S = 120.0
TELL_AGAIN_S = 1.0
"""Time after which the workers that know an owner are checked again."""
_ANNOUNCE_S = 1.0


class Owners:
    """See the module docstring."""

    def __init__(self, peers: Peers, instance: int) -> None:
        self._peers = peers
        self._instance = instance
        self._known: dict[RequestId, tuple[Owner, float]] = {}
        self._telling: dict[RequestId, tuple[Owner, asyncio.Future[frozenset[int]]]] = {}
        self._teller: asyncio.Task[None] | None = None

    def get(self, request_id: RequestId) -> Owner | None:
        """The announced owner of a request; None for a new one."""
        found = self._known.get(request_id)
        return found[0] if found is not None and found[1] > time.monotonic() else None

    def forget(self, request_id: RequestId) -> None:
        """Drop a lost owner."""
        self._known.pop(request_id, None)

    def sweep(self) -> None:
        """Drop old records."""
        now = time.monotonic()
        self._known = {key: value for key, value in self._known.items() if value[1] > now}

    def learn(self, owners: Sequence[tuple[RequestId, Owner]]) -> None:
        """Take another worker's records, except those of an earlier attempt than a known one."""
        until = time.monotonic() + OWNER_S
        for request_id, owner in owners:
            if (known := self.get(request_id)) is None or owner.order >= known.order:
                self._known[request_id] = (owner, until)

    def known_to(self, workers: Collection[int], told: frozenset[int]) -> bool:
        """True when ``told`` has each worker that could get a repeat."""
        # With disaggregated prefill a repeat passes a prefill worker; one without this package knows no owners.
        first, ours = self._peers.prefill_workers(), self._peers.instances()
        prefilled = first is None or any(instance in told or instance not in ours for instance in first)
        return prefilled and bool(workers) and told.issuperset(workers)

    async def tell(self, request_id: RequestId, away: Away) -> None:
        """Announce the owner of a request that has left, and note in ``away`` the workers that know it."""
        away.told, owner = None, away.owner
        told = await self._announce(request_id, owner)
        if away.owner is owner:
            away.told, away.told_at = told, time.monotonic()

    async def _announce(self, request_id: RequestId, owner: Owner) -> frozenset[int]:
        """The workers that know the owner, this one included, after all have answered or timed out."""
        waiting = self._telling.get(request_id)
        done = waiting[1] if waiting is not None else asyncio.get_running_loop().create_future()
        self._telling[request_id] = (owner, done)
        if self._teller is None or self._teller.done():
            self._teller = asyncio.ensure_future(self._tell())
        return await asyncio.shield(done)

    async def _tell(self) -> None:
        while self._telling:
            batch, self._telling = self._telling, {}
            records = tuple((request_id, owner) for request_id, (owner, _) in batch.items())
            self.learn(records)
            call = WorkerCall(WorkerOp.OWNERS, owners=records)
            what = f"of {len(records)} requests"
            know = await tell_others(self._peers, self._instance, call, _ANNOUNCE_S, what)
            for _, done in batch.values():
                if not done.done():
                    done.set_result(know | {self._instance})
