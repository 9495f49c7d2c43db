# SPDX-License-Identifier: Apache-2.0
"""Paged engines that send each other commits, as vLLM's do (``components.engine.vllm.direct``)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec

from components.engine.kv import CommitTo, Frozen, LandingStatus, RequestId
from components.engine.paged import PagedEngine, PagedOptions
from components.engine.protocol import GenerateOutput, GenerateRequest
from components.errors import MigrateError, SessionError

Reach = Callable[[str], "DirectEngine | None"]
"""An engine by its name; None: it is not there."""


class DirectEngine(PagedEngine):
    """``reach`` finds the engine that a commit goes to; a commit takes ``delay_s``."""

    def __init__(self, options: PagedOptions, agents: Any, reach: Reach, delay_s: float = 0.0) -> None:
        super().__init__(options, agents)
        self._reach = reach
        self._delay_s = delay_s
        self._name = str(options.agent["name"])
        self._committed: dict[RequestId, tuple[int, ...]] = {}
        """Tokens of direct commits, also of requests that have ended."""
        self._told: set[RequestId] = set()
        """Those whose worker's commit has come."""
        self._sending: set[asyncio.Task[None]] = set()

    async def landing_status(self, request_id: RequestId, wait_s: float = 0.0) -> LandingStatus:
        status = await super().landing_status(request_id, wait_s)
        active = self.parts.scheduler.get(request_id)
        if active.landing is None or active.landing.commit is not None:
            return status
        return msgspec.structs.replace(status, commit_to=CommitTo(self._name, "1", request_id))

    async def freeze(
        self, request_id: RequestId, commit_to: CommitTo | None = None, use_within_s: float = 0.0
    ) -> Frozen:
        frozen = await super().freeze(request_id, commit_to, use_within_s)
        if commit_to is not None:
            state = msgspec.structs.replace(frozen, use_within_s=use_within_s)
            task = asyncio.ensure_future(self._send(commit_to, state))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)
        return frozen

    async def _send(self, to: CommitTo, frozen: Frozen) -> None:
        await asyncio.sleep(self._delay_s)
        if (engine := self._reach(to.address)) is not None:
            engine.take(to.request_id, frozen)

    def take(self, request_id: RequestId, frozen: Frozen) -> None:
        """A commit has come; one that is refused is left to the worker's."""
        active = self.parts.scheduler.requests.get(request_id)
        if active is None or active.landing is None or active.landing.commit is not None:
            return
        try:
            self.parts.landings.commit(active, frozen)
        except MigrateError:
            return
        self._committed[request_id] = frozen.output_token_ids

    async def commit(self, request_id: RequestId, frozen: Frozen) -> None:
        tokens = self._committed.get(request_id)
        if tokens is None:
            await super().commit(request_id, frozen)
        elif tokens != frozen.output_token_ids:
            raise SessionError("the source's engine has committed other tokens than its worker")
        else:
            self._told.add(request_id)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[GenerateOutput]:
        untold = request.landing is not None
        async for output in super().generate(request):
            tokens = self._committed.get(request.request_id)
            if untold and tokens is not None and output.token_ids:
                untold = False
                active = self.parts.scheduler.requests.get(request.request_id)
                if active is not None:
                    self._leases.stop(active)
                if request.request_id not in self._told:
                    output = msgspec.structs.replace(output, committed=tokens)
            yield output
