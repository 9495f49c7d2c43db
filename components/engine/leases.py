# SPDX-License-Identifier: Apache-2.0
"""Leases of requests on the move: an engine ends a frozen or landing request whose owner is silent for too long.

The owner's calls renew the lease, so that a lost owner cannot hold KV blocks for ever. Threading: one asyncio loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from components.engine.kv import RequestId
from components.errors import DeadlineExceeded

logger = logging.getLogger(__name__)


class Held(Protocol):
    """One stay of a request in the engine."""

    @property
    def request_id(self) -> RequestId:
        """The caller's id, which a later request may have as well."""
        ...


T = TypeVar("T", bound=Held)


class Leases(Generic[T]):
    """See the module docstring. ``end`` is called with the request and the error, as (code, message)."""

    def __init__(self, lease_s: float, end: Callable[[T, tuple[str, str]], None]) -> None:
        self._lease_s = lease_s
        self._end = end
        self._timers: dict[T, asyncio.TimerHandle] = {}
        self.expired = 0

    def __contains__(self, request: T) -> bool:
        return request in self._timers

    def renew(self, request: T) -> None:
        """Begin the lease, or begin it again."""
        self.stop(request)
        self._timers[request] = asyncio.get_running_loop().call_later(self._lease_s, self._over, request)

    def stop(self, request: T) -> None:
        """The request is at rest, or has ended. Idempotent."""
        if (timer := self._timers.pop(request, None)) is not None:
            timer.cancel()

    def _over(self, request: T) -> None:
        del self._timers[request]
        message = f"its owner was silent for {self._lease_s:g} s while the request was on the move"
        logger.warning("request %s ended: %s", request.request_id, message)
        self.expired += 1
        self._end(request, (DeadlineExceeded.code, message))
