# SPDX-License-Identifier: Apache-2.0
"""The ``nccl`` lane's connection to one epoch of a peer, what decides whether there can be one, and the lane's slots.

Threading: the holder of a line's lock uses the line; slots may be used from any thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from components.errors import DeadlineExceeded, TransferCancelled
from components.transfer.control.record import AgentRecord
from components.transfer.data import nccl_wire
from components.transfer.data.nccl_link import Link, Stopped
from components.transfer.data.staging import Staging
from components.transfer.layout import Region

_MEANWHILE_S = 5.0
"""Set-up time of a link after which transfers use the next lane until the link exists."""


@dataclass(frozen=True)
class Card:
    """What decides whether two agents can have a communicator: NCCL needs two GPUs and one version."""

    gpu: str
    version: str


def card_of(device: torch.device) -> Card:
    """The card of a GPU of this process."""
    return Card(str(torch.cuda.get_device_properties(device).uuid), nccl_wire.nccl_version())


@dataclass
class Line:
    """The connection to one epoch of a peer. The transfer that uses it holds the lock."""

    peer: AgentRecord
    lock: threading.Lock = field(default_factory=threading.Lock)
    link: Link | None = None
    opening: Future[Link] | None = None
    began: float = 0.0
    losses: int = 0

    @property
    def late(self) -> bool:
        """True while set-up takes longer than ``_MEANWHILE_S``."""
        opening = self.opening
        return opening is not None and not opening.done() and time.monotonic() > self.began + _MEANWHILE_S

    def take_links(self) -> list[Link]:
        """The links to close when the line is given up."""
        opening, self.opening = self.opening, None
        made = opening is not None and opening.done() and opening.exception() is None
        link, self.link = self.link, None
        return [each for each in (link, opening.result() if opening is not None and made else None) if each is not None]


class Slots:
    """Slots, allocated for the first link: most agents never need them."""

    def __init__(self, regions: Sequence[Region], limit_bytes: int) -> None:
        self._regions = list(regions)
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._staging: Staging | None = None

    def memory(self) -> Staging:
        """The slots' memory."""
        with self._lock:
            if self._staging is None:
                self._staging = Staging(self._regions, self._limit_bytes)
            return self._staging

    def chunks(self, blocks: int) -> int:
        """Number of chunks of a transfer."""
        staging = self._staging
        return len(staging.chunks(blocks, staging.slot_bytes)) if staging else 0

    def take(self, side: str) -> list[int]:
        """All slots of a side, or none."""
        staging = self.memory()
        with self._lock:
            return staging.acquire(side, staging.side)

    def give(self, side: str, slots: Sequence[int]) -> None:
        """Release slots."""
        staging = self.memory()
        with self._lock:
            staging.release(side, slots)


def wait_for(done: Stopped, end: float, stopped: Stopped) -> None:
    """Call ``done``, which pauses each time, until it returns True."""
    while True:
        if stopped():
            raise TransferCancelled("the transfer was stopped")
        if time.monotonic() > end:
            raise DeadlineExceeded("the link to the peer was not free within the deadline")
        if done():
            return


def paused(seconds: float) -> bool:
    """Pause. True."""
    time.sleep(seconds)
    return True
