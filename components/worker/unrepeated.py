# SPDX-License-Identifier: Apache-2.0
"""Requests that Dynamo's frontend does not send again, or of which a repeat would not give all that was asked for.

They move like others; the worker that they came to relays them to their end. What a call of the engine does not tell is
read from the frontend's request: ``handler_class`` makes Dynamo's handler note it.
"""

from __future__ import annotations

import weakref
from collections.abc import AsyncIterator, Mapping
from typing import Any

# ``prefill_worker_id`` is no sign: with prefill and decode apart, the frontend itself sets it.
_TIED = ("backend_instance_id", "decode_worker_id")
_WHOLE = "engine_data"


def why(request: Mapping[str, Any]) -> str:
    """Why this request of the frontend is relayed to its end; empty when it can be repeated."""
    routing = request.get("routing") or {}
    if any(routing.get(key) is not None for key in _TIED):
        return "the client has chosen the worker: the frontend does not repeat it"
    extra = request.get("extra_args") or {}
    nvext = request.get("nvext") or (extra.get("nvext") if isinstance(extra, Mapping) else None) or {}
    if _WHOLE in (nvext.get("extra_fields") or ()):
        return "engine_data: one worker collects it from the first token to the last"
    return ""


class Unrepeated:
    """Ids of such requests that are being served, with the reason."""

    def __init__(self) -> None:
        self._streams: weakref.WeakValueDictionary[str, object] = weakref.WeakValueDictionary()
        self._reasons: weakref.WeakKeyDictionary[object, str] = weakref.WeakKeyDictionary()

    def why(self, request_id: str) -> str:
        """Why this one is relayed to its end; empty when it is none of them."""
        stream = self._streams.get(request_id)
        return self._reasons.get(stream, "") if stream is not None else ""

    def note(self, request_id: str, reason: str, while_alive: object) -> None:
        """Keep an id for as long as the stream of its answer exists."""
        self._streams[request_id] = while_alive
        self._reasons[while_alive] = reason


def handler_class(base: type, unrepeated: Unrepeated) -> type:
    """Dynamo's handler class, which notes such requests. Its streams are the base's own."""

    class Handler(base):  # type: ignore[misc]
        """See ``handler_class``."""

        def generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
            """Dynamo's ``generate``."""
            stream: AsyncIterator[Any] = super().generate(request, context)
            if isinstance(request, Mapping) and (reason := why(request)):
                unrepeated.note(str(context.id()), reason, stream)
            return stream

    Handler.__name__ = base.__name__
    return Handler
