# SPDX-License-Identifier: Apache-2.0
"""Requests that a client has tied to a worker (``nvext``): Dynamo's frontend does not send these again.

They move like others; the worker that they came to relays them to their end. ``handler_class`` makes Dynamo's handler
note their ids, which its call of the engine does not tell.
"""

from __future__ import annotations

import weakref
from collections.abc import AsyncIterator, Mapping
from typing import Any

# ``prefill_worker_id`` is no sign: with prefill and decode apart, the frontend itself sets it.
_KEYS = ("backend_instance_id", "decode_worker_id")
WHY = "the client has chosen the worker: the frontend does not repeat it"


def is_pinned(request: Mapping[str, Any]) -> bool:
    """Does the frontend's request name a worker?"""
    routing = request.get("routing") or {}
    return any(routing.get(key) is not None for key in _KEYS)


class Pinned:
    """Ids of the pinned requests that are being served."""

    def __init__(self) -> None:
        self._ids: weakref.WeakValueDictionary[str, object] = weakref.WeakValueDictionary()

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._ids

    def note(self, request_id: str, while_alive: object) -> None:
        """Keep an id for as long as the stream of its answer exists."""
        self._ids[request_id] = while_alive


def handler_class(base: type, pinned: Pinned) -> type:
    """Dynamo's handler class, which notes pinned requests. Its streams are the base's own."""

    class Handler(base):  # type: ignore[misc]
        """See ``handler_class``."""

        def generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
            """Dynamo's ``generate``."""
            stream: AsyncIterator[Any] = super().generate(request, context)
            if isinstance(request, Mapping) and is_pinned(request):
                pinned.note(str(context.id()), stream)
            return stream

    Handler.__name__ = base.__name__
    return Handler
