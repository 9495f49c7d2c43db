# SPDX-License-Identifier: Apache-2.0
"""Calls into the engine core of an ``AsyncLLM`` that is started with ``arguments.configure``.

Call ``info`` first: it gives the workers their model runners.

Threading: one asyncio loop. Time-outs: the caller's. Errors: those of ``Migration``; ``WorkerLost`` when the core has
died; ``MigrateError`` for any other failure inside vLLM.

A request is named by the caller's id, or by vLLM's internal one (``internal_id``). Only the internal id names one
life of the request: with it a late call finds nothing instead of the request's next life.
"""

from __future__ import annotations

from typing import Any, TypeVar

from components.engine.kv import CommitTo, Frozen, KVOffer, LandingStatus, RequestId
from components.engine.protocol import EngineStats, RequestInfo
from components.engine.vllm.control import Call, Op, Reply, decode_reply, encode
from components.errors import MigrateError, RequestNotFound, WorkerLost

T = TypeVar("T")


class CoreClient:
    """One method for each ``Op``."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def internal_id(self, request_id: RequestId) -> RequestId | None:
        """vLLM's id of the newest request of that name, known once ``generate`` has yielded or waits."""
        ids = self._llm.output_processor.external_req_ids.get(request_id)
        return RequestId(ids[-1]) if ids else None

    async def info(self) -> Reply:
        """Agents, lanes, fingerprint and block counts."""
        return await self._call(Call(Op.INFO))

    async def offer(self, request_id: RequestId) -> KVOffer:
        """The full, computed blocks of a request."""
        return _given((await self._call(Call(Op.OFFER, request_id))).offer)

    async def freeze(
        self, request_id: RequestId, commit_to: CommitTo | None = None, use_within_s: float = 0.0
    ) -> Frozen:
        """Stop generating and return the state."""
        call = Call(Op.FREEZE, request_id, commit_to=commit_to, use_within_s=use_within_s)
        return _given((await self._call(call)).frozen)

    async def resume(self, request_id: RequestId) -> None:
        """Continue generating."""
        await self._call(Call(Op.RESUME, request_id))

    async def landing_status(self, request_id: RequestId, wait_s: float = 0.0) -> LandingStatus:
        """Progress of a landing request; with ``wait_s`` when its round has ended, however long that takes."""
        return _given((await self._call(Call(Op.LANDING, request_id, hold_s=wait_s))).landing)

    async def extend(self, request_id: RequestId, offer: KVOffer, tokens: tuple[int, ...]) -> None:
        """Another round of copying."""
        await self._call(Call(Op.EXTEND, request_id, offer=offer, tokens=tokens))

    async def expect_commit(self, request_id: RequestId, hold_s: float) -> None:
        """Begin no step before the commit, for ``hold_s`` at most."""
        await self._call(Call(Op.EXPECT_COMMIT, request_id, hold_s=hold_s))

    async def commit(self, request_id: RequestId, frozen: Frozen) -> None:
        """Copy what is missing and run."""
        await self._call(Call(Op.COMMIT, request_id, frozen=frozen))

    async def release(self, vllm_id: RequestId) -> None:
        """Free the blocks lent under that id, if any."""
        await self._call(Call(Op.RELEASE, vllm_id))

    async def report(self) -> tuple[EngineStats, list[RequestInfo]]:
        """Load and the per-request table, with one interruption of the engine."""
        reply = await self._call(Call(Op.REPORT))
        return _given(reply.stats), list(reply.requests)

    async def check_integrity(self) -> None:
        """Raise ``SessionError`` when blocks and requests do not add up."""
        await self._call(Call(Op.CHECK))

    async def _call(self, call: Call) -> Reply:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            data = await self._llm.engine_core.call_utility_async("kv_control", encode(call))
        except EngineDeadError as error:
            raise WorkerLost(f"vLLM's engine core is dead: {error}") from error
        except Exception as error:
            raise MigrateError(f"{call.op} failed inside vLLM: {error}") from error
        return decode_reply(data)


def _given(value: T | None) -> T:
    if value is None:
        raise RequestNotFound("the engine answered without the value that was asked for")
    return value
