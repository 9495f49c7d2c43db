# SPDX-License-Identifier: Apache-2.0
"""What every way of moving blocks offers.

Contract: ``fetch`` gives a generator that the agent's worker thread steps. It yields ``True`` after
it did something and ``False`` when it waits for others, returns the result, or raises a ``TransferError``.
The worker owns deadline and cancel: it throws them into the generator, once. Whatever way the generator
ends, nothing writes to the destination blocks afterwards, unless ``Copy.poison`` has named them.
All calls come from the worker thread, but for the steps of backends that say ``at_once``: those may come from the
thread that asked for the transfer, never from two at a time. A backend that has to block does so on threads of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Protocol

from components.transfer.config import Strategy, TransferResult
from components.transfer.control.record import AgentRecord
from components.transfer.layout import Ints

Steps = Generator[bool, None, TransferResult]


def _ignore(_: int) -> None:
    """Nobody follows this copy."""


def _harmless() -> Callable[[], None]:
    return lambda: None


@dataclass(frozen=True)
class Copy:
    """Pairs of blocks: each remote one, the peer's, is copied into the local one beside it."""

    peer: AgentRecord
    local: Ints
    remote: Ints
    request_id: str
    end: float
    """When it must be over, on ``time.monotonic``."""
    arrived: Callable[[int], None] = field(default=_ignore)
    """Told of every piece's bytes."""
    poison: Callable[[], Callable[[], None]] = field(default=_harmless)
    """Called when a hanging peer may write later; what it gives is called once that is over."""
    strategy: Strategy = Strategy.AUTO
    """Asked for by the caller; ways that know only one ignore it."""


class Backend(Protocol):
    """One way of moving blocks."""

    @property
    def lane(self) -> str:
        """What is reported as the lane."""
        ...

    @property
    def at_once(self) -> bool:
        """True when a transfer's first step may run on the thread that asks for it, once the peer is connected."""
        ...

    def reaches(self, peer: AgentRecord) -> bool:
        """True when this backend can talk to the peer."""
        ...

    def fetch(self, copy: Copy) -> Steps:
        """Copy the peer's blocks into ours, pairwise."""
        ...

    def warm_up(self, copy: Copy) -> Steps:
        """Connect to the peer, moving no block."""
        ...

    def progress(self) -> list[Generator[bool, None, None]]:
        """Called often by the worker thread. Gives new work that peers asked for."""
        ...

    def close(self) -> None:
        """Give everything back. Nothing may be called afterwards."""
        ...
