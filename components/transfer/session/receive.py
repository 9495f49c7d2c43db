# SPDX-License-Identifier: Apache-2.0
"""The destination's side of a staged transfer: scatters landed chunks, tells the source which slots are free.

The worker thread steps it until ``done``. ``settle`` must be called at every end: it waits for queued copies (some
milliseconds at most), which write into the destination's blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from components.transfer.data.base import Copy
from components.transfer.data.staging import Gate, Staging


class StagedReceive:
    """The chunks of one transfer, from slots to blocks."""

    def __init__(self, staging: Staging, copy: Copy, slots: Sequence[int], freed: Callable[[int], None]) -> None:
        self._staging = staging
        self._slots = slots
        self._freed = freed
        self._packing = staging.packing(copy.share)
        self._chunks = staging.chunks(len(copy.local), staging.slot_bytes, self._packing)
        self._index = staging.index(copy.local)
        self._next = 0
        self._flying: list[tuple[int, Gate]] = []

    @property
    def done(self) -> bool:
        """True once every chunk is in its blocks."""
        return self._next == len(self._chunks) and not self._flying

    @property
    def idle(self) -> bool:
        """True when no copy is queued. Directly after ``step``: no chunk has landed either."""
        return not self._flying

    def step(self, landed: Collection[int]) -> None:
        """Queue copies of landed chunks, and finish queued ones."""
        while self._next < len(self._chunks) and self._next in landed:
            first, last = self._chunks[self._next]
            slot = self._slots[self._next % len(self._slots)]
            self._flying.append((self._next, self._staging.scatter(self._index[first:last], slot, self._packing)))
            self._next += 1
        while self._flying and self._flying[0][1].ready():
            chunk, _ = self._flying.pop(0)
            if chunk + len(self._slots) < len(self._chunks):
                self._freed(chunk)

    def settle(self) -> None:
        """Wait for queued copies."""
        for _, gate in self._flying:
            gate.wait()
