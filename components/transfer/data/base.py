# SPDX-License-Identifier: Apache-2.0
"""The interface of a lane.

Contract: ``fetch`` returns a generator that the agent's worker thread steps. It yields ``True`` after
progress and ``False`` while it waits, returns the result, or raises a ``TransferError``.
The worker owns deadline and cancel and throws them into the generator, once. However the generator
ends, nothing writes to the destination blocks afterwards, unless ``Copy.mark_unsafe`` has marked them.
All calls come from the worker thread, except the steps of backends with ``inline``: those may come from the
thread that requests the transfer, one thread at a time. A backend that must block does so on threads of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import ClassVar

from components.transfer.config import TransferResult
from components.transfer.control.record import AgentRecord
from components.transfer.layout import Ints
from components.transfer.shares import Share

Steps = Generator[bool, None, TransferResult]


def harmless() -> Callable[[], None]:
    """Nothing to mark."""
    return lambda: None


@dataclass(frozen=True)
class Copy:
    """Pairs of blocks: each remote one, the peer's, is copied into the local one beside it."""

    peer: AgentRecord
    share: Share
    """The pieces of each block that are copied."""
    local: Ints
    remote: Ints
    request_id: str
    end: float
    """Deadline on ``time.monotonic``."""
    mark_unsafe: Callable[[], Callable[[], None]] = harmless
    """Marks the local blocks as still writable by a hanging peer; returns a callback that clears the mark."""


class Backend(ABC):
    """One way of moving blocks."""

    lane: ClassVar[str]
    inline: ClassVar[bool] = False
    """True when the first step of a transfer with a connected peer may run on the requesting thread."""

    @abstractmethod
    def reaches(self, peer: AgentRecord) -> bool:
        """True when this backend can talk to the peer."""

    @abstractmethod
    def fetch(self, copy: Copy) -> Steps:
        """Copy the remote blocks into the local ones, pairwise."""

    def warm_up(self, copy: Copy) -> Steps:
        """Connect to the peer; ``copy`` has no block."""
        return self.fetch(copy)

    def progress(self) -> list[Generator[bool, None, None]]:
        """Called often by the worker thread. Returns new work that peers request."""
        return []

    @abstractmethod
    def close(self) -> None:
        """Release everything. No call may follow."""
