# SPDX-License-Identifier: Apache-2.0
"""Requests that Dynamo's frontend does not repeat, or for which a repeat would lose part of the answer.

They move like others; their first worker relays them to their end. Facts that a call of the engine does not have come
from the frontend's request: ``handler_class`` makes Dynamo's handler note them.
"""

from __future__ import annotations

import weakref
from collections.abc import AsyncIterator, Mapping
from typing import Any

# Not ``prefill_worker_id``, which the frontend itself sets with disaggregated prefill.
_TIED = ("backend_instance_id", "decode_worker_id")
_WHOLE = "engine_data"


def why(request: Mapping[str, Any]) -> str:
    """Why this request is relayed to its end; empty: it can be repeated."""
    routing = request.get("routing") or {}
    if any(routing.get(key) is not None for key in _TIED):
        return "the client has chosen the worker: the frontend does not repeat it"
    extra = request.get("extra_args") or {}
    nvext = request.get("nvext") or (extra.get("nvext") if isinstance(extra, Mapping) else None) or {}
    if _WHOLE in (nvext.get("extra_fields") or ()):
        return "engine_data: one worker collects it from the first token to the last"
    return ""


class Unrepeated:
    """Ids of such requests, with the reason."""

    def __init__(self) -> None:
        self._streams: weakref.WeakValueDictionary[str, object] = weakref.WeakValueDictionary()
        self._reasons: weakref.WeakKeyDictionary[object, str] = weakref.WeakKeyDictionary()

    def why(self, request_id: str) -> str:
        """Why this one is relayed to its end; empty: it is not."""
        stream = self._streams.get(request_id)
        return self._reasons.get(stream, "") if stream is not None else ""

    def note(self, request_id: str, reason: str, while_alive: object) -> None:
        """Context of the answer's stream, in which the id is kept."""
        self._streams[request_id] = while_alive
        self._reasons[while_alive] = reason


def handler_class(base: type, unrepeated: Unrepeated) -> type:
    """A subclass of Dynamo's handler that notes such requests; streams are unchanged."""

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
