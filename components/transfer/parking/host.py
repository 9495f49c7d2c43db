# SPDX-License-Identifier: Apache-2.0
"""Parked KV in host memory: one bounded arena in pages of a chunk, allocated at the agent's start.

Pinned where the pools are on a GPU. Threading: worker thread. Errors: ``NoRoom`` when too few pages are free.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence

import torch

from components.errors import NoRoom, RequestNotFound
from components.transfer.data.staging import Gate
from components.transfer.parking.loading import Chunks, Finish, Loader, Steps, host_memory
from components.transfer.parking.ticket import Ticket, require_same

_AHEAD = 4
"""Chunks queued at once: enough that a GPU does not wait for the worker. A cancelled transfer ends after them."""


class HostShelf:
    """See the module docstring."""

    lane = "host/memory"

    def __init__(self, loader: Loader, limit_bytes: int) -> None:
        self._loader = loader
        count = limit_bytes // loader.chunk_bytes
        self._arena = host_memory(count * loader.chunk_bytes, loader.pinned)
        self._free = list(range(count))
        self._parked: dict[str, tuple[Ticket, list[int]]] = {}

    @property
    def used_bytes(self) -> int:
        """Used bytes of the arena."""
        return len(self._arena) - len(self._free) * self._loader.chunk_bytes

    def tickets(self) -> list[Ticket]:
        """Tickets of everything parked in host memory."""
        return [ticket for ticket, _ in list(self._parked.values())]

    def put(self, name: str, index: torch.Tensor, chunks: Chunks, done: Callable[[int], None], end: Finish) -> Steps:
        """Copy blocks in."""
        if len(chunks) > len(self._free):
            size, limit = self._loader.chunk_bytes, len(self._arena)
            raise NoRoom(
                f"{len(chunks) * size >> 20} MiB cannot be parked in host memory: {len(self._free) * size >> 20} of "
                f"{limit >> 20} MiB are free (park_host_bytes)"
            )
        pages, self._free = self._free[: len(chunks)], self._free[len(chunks) :]
        try:
            yield from self._copy(self._loader.unload, index, chunks, pages, done)
            ticket = end()
            self._parked[name], pages = (ticket, pages), []
        finally:
            self._free.extend(pages)

    def get(self, ticket: Ticket, index: torch.Tensor, chunks: Chunks, done: Callable[[int], None]) -> Steps:
        """Copy blocks back."""
        if ticket.id not in self._parked:
            raise RequestNotFound(f"request {ticket.request_id} is not parked in the memory of this agent")
        found, pages = self._parked[ticket.id]
        require_same(found, ticket)
        yield from self._copy(self._loader.load, index, chunks, pages, done)

    def drop(self, ticket: Ticket) -> Generator[bool, None, bool]:
        """Drop it. False when it is not here."""
        yield True
        _, pages = self._parked.pop(ticket.id, (ticket, []))
        self._free.extend(pages)
        return bool(pages)

    def close(self) -> None:
        """Drop everything."""
        self._parked.clear()

    def _copy(
        self,
        copy: Callable[[torch.Tensor, torch.Tensor], Gate],
        index: torch.Tensor,
        chunks: Chunks,
        pages: Sequence[int],
        done: Callable[[int], None],
    ) -> Steps:
        size = self._loader.chunk_bytes
        flying: deque[tuple[int, Gate]] = deque()
        try:
            for number, (first, last) in enumerate(chunks):
                page = self._arena[pages[number] * size : (pages[number] + 1) * size]
                flying.append((number, copy(index[first:last], page)))
                yield True
                while len(flying) >= _AHEAD or (flying and number == len(chunks) - 1):
                    if flying[0][1].ready():
                        done(flying.popleft()[0])
                        yield True
                    else:
                        yield False
        finally:
            # Queued copies touch the engine's blocks; waiting takes some milliseconds at most.
            for _, gate in flying:
                gate.wait()
