# SPDX-License-Identifier: Apache-2.0
"""The engine protocol over vLLM's ``AsyncLLM``.

Requests come with ``native`` set: vLLM's own parameters. Other calls name a request by the caller's id, or by vLLM's
internal one, which names one life of the request: with it a late call finds nothing instead of the next life.
Life cycle: ``llm`` is an ``AsyncLLM`` whose arguments ``arguments.configure`` has completed; ``start`` comes before all
other calls; whoever made ``llm`` ends it.
Threading: one asyncio loop; every call into the core is one message and one answer.
Time-outs: the caller's, except one: the engine ends a frozen or landing request whose owner is silent for
``lease_s``, with an error on its stream, so that a lost owner cannot hold KV blocks for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from components.engine.kv import CommitTo, Frozen, KVOffer, LandingStatus, RequestId
from components.engine.leases import Leases
from components.engine.protocol import (
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerateOutput,
    GenerateRequest,
    RequestInfo,
)
from components.engine.vllm import native
from components.engine.vllm.control import COMMITTED, Call, Op, Reply, decode_reply, decode_tokens, encode
from components.engine.vllm.loras import Loras
from components.engine.vllm.sampling import finish_reason, logprobs_of, marked
from components.errors import InvalidRequest, MigrateError, RequestNotFound, SessionError, WorkerLost

T = TypeVar("T")


@dataclass(eq=False)
class _Live:
    """This process's state of a request in the engine."""

    request_id: RequestId
    ended: GenerateOutput | None = None
    """Final output in place of vLLM's, for a request that was ended on purpose."""
    delivered: int = 0
    cached_tokens: int | None = None
    """Cached prompt tokens at the first engine of the request; None: it began in this one."""
    landing: asyncio.Event | None = None
    """Set by the commit or by the end of the request; None after the commit."""


class VLLMEngine:
    """``components.engine.protocol.Engine`` on vLLM."""

    def __init__(self, llm: Any, lease_s: float = 60.0, loras: Loras | None = None) -> None:
        self.llm = llm
        # vLLM's own, which a worker wraps for Dynamo's handlers afterwards.
        self._generate, self._abort = llm.generate, llm.abort
        self._lease_s = lease_s
        self._loras = loras or Loras()
        self._info: EngineInfo | None = None
        self._live: dict[RequestId, _Live] = {}
        self._leases: Leases[_Live] = Leases(lease_s, self._lost)

    @property
    def info(self) -> EngineInfo:
        """Known from ``start`` on."""
        if self._info is None:
            raise WorkerLost("the engine has not been started")
        return self._info

    async def start(self) -> EngineInfo:
        """Ask the engine core about itself, which also gives the workers their model runners."""
        info = _given((await self._call(Call(Op.INFO))).info)
        self._info = msgspec.structs.replace(info, lease_s=self._lease_s)
        return self._info

    async def generate(self, request: GenerateRequest) -> AsyncIterator[GenerateOutput]:
        """See the protocol. Raises ``InvalidRequest`` before anything starts."""
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        if request.request_id in self._live:
            raise SessionError(f"request id {request.request_id} is in use in this engine")
        given = native.decode(request.native)
        prompt, params, keywords = self._arguments(request, given)
        live = self._live[request.request_id] = _Live(request.request_id, delivered=len(request.output_token_ids))
        live.cached_tokens = given.cached_tokens
        if request.landing is not None:
            live.landing = asyncio.Event()
            self._renew_lease(request.request_id)
        stream = self._generate(prompt, params, request.request_id, **keywords)
        committed: tuple[int, ...] | None = None
        try:
            async for item in stream:
                if (tokens := self._committed_directly(live, item)) is not None:
                    committed = tokens
                if item.outputs[0].token_ids and not await self._committed(live):
                    continue
                if item.finished and live.ended is not None:
                    # vLLM may have joined the last tokens with the requested end.
                    for output in self._outputs(live, item):
                        if output.token_ids:
                            yield msgspec.structs.replace(output, finish_reason=None, stop_reason=None)
                    break
                for output in self._outputs(live, item):
                    yield msgspec.structs.replace(output, committed=committed) if committed is not None else output
                    committed = None
            if live.ended is not None:
                yield msgspec.structs.replace(live.ended, index=live.delivered)
        except native.REFUSALS as error:
            raise InvalidRequest(str(error)) from error
        except EngineDeadError as error:
            yield GenerateOutput(live.delivered, finish_reason=FinishReason.ERROR, error=(WorkerLost.code, str(error)))
        except EngineGenerateError as error:
            # One request failed; the engine lives.
            raise MigrateError(f"request {request.request_id} failed inside vLLM: {error}") from error
        finally:
            self._drop(request.request_id)
            await stream.aclose()

    def _committed_directly(self, live: _Live, item: Any) -> tuple[int, ...] | None:
        """Tokens of a commit by the source's engine that arrives before the worker's. The request then runs."""
        told = (item.kv_transfer_params or {}).get(COMMITTED)
        if told is None or live.landing is None or live.ended is not None:
            return None
        live.landing = None
        self._stop_lease(live.request_id)
        tokens = decode_tokens(told)
        self._count_from(live.request_id, tokens)
        return tokens

    async def _committed(self, live: _Live) -> bool:
        """Wait for the worker's commit of a landing, whose first output can overtake it. False: it has ended."""
        while live.landing is not None and live.ended is None:
            await live.landing.wait()
        return live.landing is None

    def _arguments(self, request: GenerateRequest, given: native.Native) -> tuple[dict[str, Any], Any, dict[str, Any]]:
        prompt: dict[str, Any] = {"prompt_token_ids": [*request.prompt_token_ids, *request.output_token_ids]}
        if given.lora is not None:
            given = msgspec.structs.replace(given, lora=self._loras.here(given.lora, given.adapter))
        if given.images is not None:
            prompt = given.images.prompt(request.output_token_ids)
        if given.cache_salt is not None:
            prompt["cache_salt"] = given.cache_salt
        return prompt, marked(given.params, request), given.keywords()

    def _outputs(self, live: _Live, item: Any) -> list[GenerateOutput]:
        sample = item.outputs[0]
        tokens = tuple(sample.token_ids)
        index = live.delivered
        live.delivered += len(tokens)
        reason = finish_reason(sample.finish_reason) if item.finished else None
        if not tokens and reason is None:
            return []
        return [
            GenerateOutput(
                index=index,
                token_ids=tokens,
                logprobs=logprobs_of(sample.logprobs, tokens),
                finish_reason=reason,
                stop_reason=sample.stop_reason,
                cached_tokens=(item.num_cached_tokens or 0) if live.cached_tokens is None else live.cached_tokens,
            )
        ]

    async def abort(self, request_id: RequestId) -> None:
        """End a request in any phase; unknown ids are ignored."""
        await self._end(request_id, FinishReason.CANCELLED, None)

    async def release(self, request_id: RequestId) -> None:
        """Another engine continues the request: free its blocks here."""
        await self._end(request_id, FinishReason.FROZEN, None)

    async def _end(self, request_id: RequestId, reason: FinishReason, error: tuple[str, str] | None) -> None:
        live = self._live.get(request_id)
        if live is None:
            # For a request of Dynamo's handler, which sees an aborted stream.
            await self._abort(request_id)
            return
        live.ended = GenerateOutput(live.delivered, finish_reason=reason, error=error)
        if live.landing is not None:
            live.landing.set()
        await self._abort(request_id)

    async def offer(self, request_id: RequestId) -> KVOffer:
        """The full, computed blocks of a request."""
        return _given((await self._call(Call(Op.OFFER, request_id))).offer)

    async def freeze(
        self, request_id: RequestId, commit_to: CommitTo | None = None, use_within_s: float = 0.0
    ) -> Frozen:
        """Stop generating and return the state."""
        call = Call(Op.FREEZE, request_id, commit_to=commit_to, use_within_s=use_within_s)
        frozen = _given((await self._call(call)).frozen)
        self._renew_lease(request_id)
        return frozen

    async def resume(self, request_id: RequestId) -> None:
        """Continue generating."""
        await self._call(Call(Op.RESUME, request_id))
        live = self._live.get(request_id)
        if live is None or live.landing is None:
            # One that still lands runs elsewhere: only its owner's commit ends its lease.
            self._stop_lease(request_id)

    async def landing_status(self, request_id: RequestId, wait_s: float = 0.0) -> LandingStatus:
        """Progress of a landing request. After its commit no lease begins, because nobody would end it."""
        live = self._live.get(request_id)
        if live is not None and live in self._leases:
            self._leases.renew(live)
        if wait_s:
            # Asking again and again would stop the engine's steps each time.
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    return _given((await self._call(Call(Op.LANDING, request_id, hold_s=wait_s))).landing)
        return _given((await self._call(Call(Op.LANDING, request_id))).landing)

    async def extend(self, request_id: RequestId, offer: KVOffer, tokens: tuple[int, ...]) -> None:
        """Another pre-copy round."""
        self._renew_lease(request_id)
        await self._call(Call(Op.EXTEND, request_id, offer=offer, tokens=tokens))
        self._count_from(request_id, tokens)

    async def expect_commit(self, request_id: RequestId, hold_s: float) -> None:
        """Begin no step before the commit, for ``hold_s`` at most."""
        await self._call(Call(Op.EXPECT_COMMIT, request_id, hold_s=hold_s))

    async def commit(self, request_id: RequestId, frozen: Frozen) -> None:
        """Copy what is missing and run."""
        self._stop_lease(request_id)
        # This precedes the call: the first token may overtake the call's answer, or wait here already.
        self._count_from(request_id, frozen.output_token_ids)
        live = self._live.get(request_id)
        landing = live.landing if live is not None else None
        if live is not None and landing is not None:
            live.landing = None
            landing.set()
        try:
            await self._call(Call(Op.COMMIT, request_id, frozen=frozen))
        except MigrateError:
            if live is not None and landing is not None:
                live.landing = asyncio.Event()
            self._renew_lease(request_id)
            raise

    def _count_from(self, request_id: RequestId, tokens: tuple[int, ...]) -> None:
        live = self._live.get(request_id)
        if live is not None:
            live.delivered = max(live.delivered, len(tokens))

    async def report(self) -> tuple[EngineStats, list[RequestInfo]]:
        """Load and table, in one call."""
        reply = await self._call(Call(Op.REPORT))
        stats = msgspec.structs.replace(_given(reply.stats), leases_expired_total=self._leases.expired)
        return stats, list(reply.requests)

    async def free_lent(self, vllm_id: RequestId, expired: bool = False) -> None:
        """Free blocks lent to a decode engine; ``expired``: none has asked for them in time."""
        await self._call(Call(Op.RELEASE, vllm_id, expired=expired))

    async def check_integrity(self) -> None:
        """Raise ``SessionError`` when blocks and requests do not add up."""
        await self._call(Call(Op.CHECK))

    async def _call(self, call: Call) -> Reply:
        """One call into the engine core. Raises the errors of ``Migration``; ``WorkerLost`` when the core has died."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            data = await self.llm.engine_core.call_utility_async("kv_control", encode(call))
        except EngineDeadError as error:
            raise WorkerLost(f"vLLM's engine core is dead: {error}") from error
        except Exception as error:
            raise MigrateError(f"{call.op} failed inside vLLM: {error}") from error
        return decode_reply(data)

    def _renew_lease(self, request_id: RequestId) -> None:
        if (live := self._live.get(request_id)) is not None:
            self._leases.renew(live)

    def _stop_lease(self, request_id: RequestId) -> None:
        if (live := self._live.get(request_id)) is not None:
            self._leases.stop(live)

    def _lost(self, live: _Live, error: tuple[str, str]) -> None:
        task = asyncio.ensure_future(self._end(live.request_id, FinishReason.ERROR, error))
        task.add_done_callback(lambda done: done.exception())

    def _drop(self, request_id: RequestId) -> None:
        self._stop_lease(request_id)
        self._live.pop(request_id, None)


def _given(value: T | None) -> T:
    if value is None:
        raise RequestNotFound("the engine answered without the value that was asked for")
    return value
