# SPDX-License-Identifier: Apache-2.0
"""Puts migration behind the two calls by which Dynamo's handlers use an engine: ``generate`` and ``abort``.

``attach`` wraps them on vLLM's ``AsyncLLM``; everything else of it stays what it is. An unmoved request takes the
engine's own stream, item by item. Raises Dynamo's ``Disconnected`` where the frontend shall send a request again: it
then does so with the same id and the tokens so far, and keeps this worker in rotation.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from components.engine.protocol import RequestId
from components.engine.vllm import native
from components.migration.legs import Leg
from components.migration.requests import Repeat, Requests

_PINNED = "the client has chosen the worker: the frontend does not repeat it"


class _Bare:
    """The engine without the wrapping, for our own calls."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self.generate = llm.generate
        self.abort = llm.abort

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)


class EngineClient:
    """See the module docstring. ``requests`` is set once the worker serves."""

    def __init__(self, llm: Any) -> None:
        self.bare = _Bare(llm)
        self._generate = llm.generate
        self._abort = llm.abort
        self.requests: Requests | None = None
        self.pinned: set[str] = set()
        """Ids of requests that a client has tied to this worker: the frontend does not repeat them."""
        # Dynamo reads the signature of ``generate``.
        llm.generate = functools.wraps(llm.generate)(functools.partial(self.generate))
        llm.abort = functools.wraps(llm.abort)(functools.partial(self.abort))

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **keywords: Any
    ) -> AsyncGenerator[Any, None]:
        """``AsyncLLM.generate``."""
        if self.requests is None:
            async with aclosing(self._generate(prompt, sampling_params, request_id, **keywords)) as stream:
                async for item in stream:
                    yield item
            return
        stream = self._stream(self.requests, prompt, sampling_params, RequestId(request_id), keywords)
        try:
            async with aclosing(stream):
                async for item in stream:
                    yield item
        except Repeat as repeat:
            from dynamo.llm.exceptions import Disconnected

            raise Disconnected(str(repeat)) from None

    async def _stream(
        self, requests: Requests, prompt: Any, params: Any, request_id: RequestId, keywords: dict[str, Any]
    ) -> AsyncGenerator[Any, None]:
        tokens = native.prompt_tokens(prompt)
        face = native.OutputFace(request_id, tokens)

        def encoded() -> bytes:
            return native.encode(_native(prompt, params, keywords))

        if tokens is not None:
            repeated = requests.repeated(request_id, tokens, encoded, params.max_tokens)
            if repeated is not None:
                async with aclosing(repeated):
                    async for output in repeated:
                        yield face.make(output)
                return
        leg = Leg(
            request_id,
            request_id,
            tokens or (),
            encoded,
            fixed=native.why_fixed(prompt, params, keywords.get("data_parallel_rank")),
            attached=native.why_attached(params)
            or (
                "the client has chosen the worker: the frontend does not repeat it" if request_id in self.pinned else ""
            ),
            max_tokens=params.max_tokens,
        )
        own = self._generate(prompt, params, request_id, **keywords)
        async with aclosing(own), aclosing(requests.serve(leg, own, face)) as stream:
            async for item in stream:
                yield item

    async def abort(self, request_id: Any, *args: Any, **keywords: Any) -> None:
        """``AsyncLLM.abort``; ends the request also where it has gone."""
        if (
            isinstance(request_id, str)
            and self.requests is not None
            and await self.requests.abort(RequestId(request_id))
        ):
            return
        await self._abort(request_id, *args, **keywords)


def _native(prompt: Any, params: Any, keywords: dict[str, Any]) -> native.Native:
    return native.Native(
        params,
        priority=keywords.get("priority") or 0,
        lora=keywords.get("lora_request"),
        cache_salt=prompt.get("cache_salt"),
        session_id=keywords.get("session_id"),
        trace_headers=dict(keywords["trace_headers"]) if keywords.get("trace_headers") else None,
        reasoning_ended=keywords.get("reasoning_ended"),
        reasoning_parser_kwargs=keywords.get("reasoning_parser_kwargs"),
    )
