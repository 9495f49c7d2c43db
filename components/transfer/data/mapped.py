# SPDX-License-Identifier: Apache-2.0
"""Blocks between processes of one host whose pools are in shared memory: one copy, block to block.

The first contact maps a peer's pools; a fetch then reads its blocks directly. Copies run on the threads of
``HostCopier`` in bounded pieces: a cancelled transfer ends after the pieces in flight (some milliseconds). The end of
a peer is detected before the result is returned, and its memory is unmapped after the last copy.
Threading: worker thread; mapping and copying on threads of their own. Errors: ``TransferError``.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import numpy as np

from components.errors import TransferError
from components.transfer import profiling
from components.transfer.config import TransferResult
from components.transfer.control.record import AgentRecord
from components.transfer.data.base import Backend, Copy, Steps
from components.transfer.data.handover import Giver, Mapping, map_peer
from components.transfer.data.hostcopy import HostCopier
from components.transfer.data.shared import SharedStorage, scope
from components.transfer.layout import batches

_Flying = deque[Future[None]]
_PIECE_BYTES = 8 << 20
_AHEAD = 4
"""Pieces queued for each thread, so that no thread waits for the worker."""
_AROUND_BYTES = 4 << 20
"""Size from which a transfer bypasses the caches: it takes a third less time and leaves the engine's data there. A
smaller transfer leaves its own bytes there for the next step."""
_LOOK_S = 0.25
"""Interval between checks of mapped peers."""


class MappedBackend(Backend):
    """See the module docstring."""

    lane = "shm/mapped"

    def __init__(
        self,
        host: str,
        epoch: str,
        storages: Sequence[SharedStorage],
        copier: HostCopier,
    ) -> None:
        self._host = host
        self._copier = copier
        self._giver = Giver(epoch, storages)
        self.scope = scope()
        self._mapper = ThreadPoolExecutor(2, thread_name_prefix="kv-map")
        self._mappings: dict[str, Future[Mapping]] = {}
        self._lingering: list[tuple[list[Future[None]], Callable[[], None]]] = []
        self._refused: set[str] = set()
        self._looked = 0.0

    def reaches(self, peer: AgentRecord) -> bool:
        """True for an agent of the same host, network namespace and user that shares its pools."""
        here = peer.host == self._host and peer.scope == self.scope
        return here and bool(self.scope) and peer.epoch not in self._refused

    def warm_up(self, copy: Copy) -> Steps:
        """Map the peer's memory."""
        begun = time.perf_counter()
        yield from self._mapping(copy)
        return TransferResult(wire_s=time.perf_counter() - begun, lane=self.lane)

    def _mapping(self, copy: Copy) -> Generator[bool, None, Mapping]:
        peer = copy.peer
        if peer.epoch not in self._mappings:
            self._mappings[peer.epoch] = self._mapper.submit(map_peer, peer.name, peer.epoch, copy.end)
        # Several transfers may wait for it; the first that sees it fail removes it from the table.
        future = self._mappings[peer.epoch]
        while not future.done():
            yield False
        try:
            mapping = future.result()
            if mapping.alive():
                return mapping
        except TransferError:
            # Its record says that it shares memory: another lane must serve this epoch.
            self._refused.add(peer.epoch)
            self._mappings.pop(peer.epoch, None)
            raise
        raise TransferError(f"agent {peer.name} is gone")

    def fetch(self, copy: Copy) -> Steps:
        """See ``Backend``."""
        begun = time.perf_counter()
        mapping = yield from self._mapping(copy)
        mapping.users += 1
        flying: _Flying = deque()
        try:
            # Writing in ascending order is up to a quarter faster, whatever the order of reading.
            order = np.argsort(copy.local)
            local = copy.share.local
            remote = [mapping.seen(segment, copy.peer.num_blocks) for segment in copy.share.remote]
            total = len(order) * copy.share.block_bytes
            descriptors, prepared = 0, time.perf_counter()
            for group in batches(local, remote, copy.local[order], copy.remote[order], _PIECE_BYTES):
                yield from _landed(flying, _AHEAD * self._copier.threads)
                size = int(group[:, 2].sum())
                with profiling.span("post", size):
                    mark = profiling.begin("wire", size)
                    job = self._copier.submit(group[:, 0], group[:, 1], group[:, 2], around=total >= _AROUND_BYTES)
                if mark is not None:
                    job.add_done_callback(partial(_arrived, mark))
                flying.append(job)
                descriptors += len(group)
                yield True
            yield from _landed(flying, 0)
            if not mapping.alive():
                raise TransferError(f"agent {copy.peer.name} is gone")
            wire = time.perf_counter() - prepared
            return TransferResult(total, descriptors, prepared - begun, 0.0, wire, self.lane)
        except GeneratorExit:
            raise
        except BaseException:
            yield from _landed(flying, 0)
            raise
        finally:
            self._let_go(mapping, flying, copy)

    def _let_go(self, mapping: Mapping, flying: _Flying, copy: Copy) -> None:
        if not flying:
            mapping.users -= 1
            return
        # Only when the worker's grace ends before a piece does: mark the blocks until the last piece has ended.
        settled = copy.mark_unsafe()

        def quiet() -> None:
            mapping.users -= 1
            settled()

        self._lingering.append((list(flying), quiet))

    def progress(self) -> list[Generator[bool, None, None]]:
        """No peer requests over this lane. Unmap peers that have gone."""
        for item in list(self._lingering):
            if all(job.done() for job in item[0]):
                self._lingering.remove(item)
                item[1]()
        now = time.monotonic()
        if self._mappings and now - self._looked > _LOOK_S:
            self._looked = now
            for epoch, future in list(self._mappings.items()):
                if future.done() and future.exception() is None:
                    mapping = future.result()
                    if not mapping.users and not mapping.alive():
                        del self._mappings[epoch]
                        mapping.close()
        return []

    def close(self) -> None:
        """Stop sharing, unmap all peers."""
        self._giver.close()
        self._copier.close()
        self._mapper.shutdown(wait=True, cancel_futures=True)
        for future in self._mappings.values():
            with suppress(Exception):
                future.result().close()
        self._mappings.clear()


def _arrived(mark: object, _: Future[None]) -> None:
    profiling.end(mark)


def _landed(flying: _Flying, most: int) -> Generator[bool, None, None]:
    """Wait until ``most`` pieces are left in flight, the oldest first."""
    while len(flying) > most:
        if not flying[0].done():
            yield False
            continue
        flying.popleft().result()
