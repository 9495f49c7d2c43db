# SPDX-License-Identifier: Apache-2.0
"""Puts migration behind the engine calls of Dynamo's handlers: ``generate`` and ``abort``.

``attach`` wraps them on vLLM's ``AsyncLLM`` and leaves everything else. An unmoved request uses the engine's own
stream, item by item. Raises Dynamo's ``Disconnected`` to make the frontend repeat a request: it does so with the same
id and the tokens so far, and keeps this worker in rotation.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from vllm.v1.engine.exceptions import EngineDeadError

from components.engine.kv import RequestId
from components.engine.vllm import checks, images, native
from components.engine.vllm.engine import VLLMEngine
from components.engine.vllm.loras import Loras
from components.errors import EngineKiller
from components.migration.legs import Leg
from components.migration.messages import Handover
from components.migration.repeats import Repeat
from components.migration.requests import Requests
from components.worker.controls import Controls
from components.worker.handoff import Entry, Handoffs, is_prefill
from components.worker.unrepeated import Unrepeated

_SHORT = "prefill: it ends with its first token"
_LATER = "images: their tokens are not known before the first output"


@dataclass(frozen=True)
class _Call:
    """One call of ``generate`` by one of Dynamo's handlers."""

    requests: Requests
    handoffs: Handoffs
    loras: Loras
    prompt: Any
    params: Any
    request_id: RequestId
    keywords: dict[str, Any]
    engine_fixes: str = ""
    """Why requests of this engine do not move; empty: they do."""

    @functools.cached_property
    def tokens(self) -> list[int] | None:
        """The prompt, if it has only token ids."""
        return native.prompt_tokens(self.prompt)

    @functools.cached_property
    def face(self) -> native.OutputFace:
        """Converts outputs of other engines."""
        return native.OutputFace(self.request_id, self.tokens)

    @property
    def images(self) -> str:
        """Why the frontend cannot repeat a prompt with more than token ids; empty where there is nothing else."""
        return "images: the frontend does not know the tokens that stand for them" if self.tokens is None else ""

    @property
    def adapter(self) -> str | None:
        """Digest of its LoRA adapter; empty: none; None: unknown."""
        lora = self.keywords.get("lora_request")
        return "" if lora is None else self.loras.digest(lora) or None

    @property
    def fixed(self) -> str:
        """Why it cannot move; empty: it can."""
        if self.adapter is None:
            return "LoRA adapter: what it is made of is not known"
        return native.why_fixed(self.prompt, self.params, self.keywords) or self.engine_fixes

    def encoded(self) -> bytes:
        """The request for another worker's engine."""
        keywords = self.keywords
        return native.encode(
            native.Native(
                self.params,
                priority=keywords.get("priority") or 0,
                lora=keywords.get("lora_request"),
                adapter=self.adapter or "",
                cached_tokens=self.face.cached_tokens,
                cache_salt=self.prompt.get("cache_salt"),
                session_id=keywords.get("session_id"),
                trace_headers=dict(keywords["trace_headers"]) if keywords.get("trace_headers") else None,
                reasoning_ended=keywords.get("reasoning_ended"),
                reasoning_parser_kwargs=keywords.get("reasoning_parser_kwargs"),
                images=images.of_prompt(self.prompt),
            )
        )


async def _learned(leg: Leg, own: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    """Outputs of a request whose prompt vLLM has made longer: it can move when that is known."""
    async with aclosing(own):
        async for item in own:
            if not leg.prompt_token_ids and item.prompt_token_ids:
                leg.prompt_token_ids = tuple(item.prompt_token_ids)
                leg.fixed = "" if leg.fixed == _LATER else leg.fixed
            yield item


class EngineClient:
    """See the module docstring. ``serve`` is called when the worker has joined the others."""

    def __init__(self, llm: Any, unrepeated: Unrepeated | None = None, lease_s: float = 60.0) -> None:
        self.loras = Loras()
        self.engine = VLLMEngine(llm, lease_s, self.loras)
        """The engine without the wrappers."""
        self._generate = llm.generate
        self._abort = llm.abort
        self._check_health = llm.check_health
        self._requests: Requests | None = None
        self._handoffs: Handoffs | None = None
        self._unrepeated = unrepeated or Unrepeated()
        self._engine_fixes = native.why_engine_fixes(llm.vllm_config)
        self._config = llm.vllm_config
        self.loras.watch(llm)
        self.controls = Controls(llm)
        # Dynamo inspects the signature of ``generate``.
        llm.generate = functools.wraps(llm.generate)(functools.partial(self.generate))
        llm.abort = functools.wraps(llm.abort)(functools.partial(self.abort))
        llm.check_health = self.check_health

    def serve(self, requests: Requests, handoffs: Handoffs) -> None:
        """Enable moves."""
        self._requests, self._handoffs = requests, handoffs

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **keywords: Any
    ) -> AsyncGenerator[Any, None]:
        """``AsyncLLM.generate``."""
        if self._requests is None or self._handoffs is None:
            async with aclosing(self._generate(prompt, sampling_params, request_id, **keywords)) as stream:
                async for item in stream:
                    yield item
            return
        call = _Call(
            self._requests,
            self._handoffs,
            self.loras,
            prompt,
            sampling_params,
            RequestId(request_id),
            keywords,
            self._engine_fixes,
        )
        checks.check(call.tokens, sampling_params, self._config)
        stream = self._prefill(call) if is_prefill(sampling_params) else self._stream(call)
        try:
            async with aclosing(stream):
                async for item in stream:
                    yield item
        except Repeat as repeat:
            from dynamo.llm.exceptions import Disconnected

            raise Disconnected(str(repeat)) from None
        except EngineKiller as error:
            from dynamo.llm.exceptions import InvalidArgument

            # The only error that the frontend shows to the client without a repeat.
            raise InvalidArgument(str(error)) from None
        except EngineDeadError:
            # Dynamo's handler ends this process on this error.
            await call.requests.suspects.engine_died()
            raise

    async def _prefill(self, call: _Call) -> AsyncGenerator[Any, None]:
        """For Dynamo's prefill handler: one token, and the loan of the prompt's blocks."""
        owner = call.requests.owners.get(call.request_id)
        if owner is not None and call.tokens and owner.repeated_by(call.tokens):
            yield call.handoffs.known(call.request_id, call.tokens, owner)
            return
        leg = Leg(call.request_id, call.request_id, call.tokens or (), call.encoded, _SHORT, _SHORT, max_tokens=1)
        if call.adapter is None:
            await self.loras.learn(call.keywords["lora_request"])
        params = call.handoffs.lending(call.params, call.request_id)
        own = self._generate(call.prompt, params, call.request_id, **call.keywords)
        async with aclosing(own), aclosing(call.requests.serve(leg, own, call.face)) as stream:
            async for item in stream:
                call.handoffs.lent(item, call.adapter or "")
                yield item

    async def _stream(self, call: _Call) -> AsyncGenerator[Any, None]:
        requests, request_id, params = call.requests, call.request_id, call.params
        given = call.handoffs.read(params)
        if given is not None and given.owner is not None:
            requests.owners.learn([(request_id, given.owner)])
        if call.tokens is not None:
            repeated = requests.repeated(request_id, call.tokens, call.encoded, params.max_tokens)
            if repeated is not None:
                if given is not None:
                    call.handoffs.give_back(given)
                # Dynamo's handler takes the usage of the prompt from the outputs.
                face = native.OutputFace(request_id, call.tokens[: requests.prompt_tokens(request_id, call.tokens)])
                async with aclosing(repeated):
                    async for output in repeated:
                        yield face.make(output)
                return
        leg = Leg(
            request_id,
            request_id,
            call.tokens or (),
            call.encoded,
            fixed=call.fixed,
            attached=native.why_attached(params) or call.images or self._unrepeated.why(request_id),
            max_tokens=params.max_tokens,
            trace=call.keywords.get("trace_headers") or {},
        )
        own = self._entered(call, given)
        if call.images and not leg.fixed:
            leg.fixed, own = _LATER, _learned(leg, own)
        async with aclosing(own), aclosing(requests.serve(leg, own, call.face)) as stream:
            async for item in stream:
                yield item

    def _entered(self, call: _Call, given: Handover | None) -> AsyncGenerator[Any, None]:
        """The engine's stream of a request, possibly after a prefill worker."""
        entry = Entry(call.prompt, call.params)
        if native.transfer_of(call.params):
            entry = call.handoffs.enter(call.request_id, call.prompt, call.params, call.tokens, given, call.adapter)
        own: AsyncGenerator[Any, None] = self._generate(entry.prompt, entry.params, call.request_id, **call.keywords)
        return own if entry.handover is None else call.handoffs.stream(entry, own, call.face, call.tokens)

    async def abort(self, request_id: Any, *args: Any, **keywords: Any) -> None:
        """``AsyncLLM.abort``; also ends a request that has moved away."""
        if (
            isinstance(request_id, str)
            and self._requests is not None
            and await self._requests.abort(RequestId(request_id))
        ):
            return
        await self._abort(request_id, *args, **keywords)

    async def check_health(self) -> None:
        """``AsyncLLM.check_health``. On its error Dynamo's monitor ends the process."""
        try:
            await self._check_health()
        except EngineDeadError:
            if self._requests is not None:
                await self._requests.suspects.engine_died()
            raise
