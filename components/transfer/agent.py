# SPDX-License-Identifier: Apache-2.0
"""The transfer agent: pools registered once, one record published, peers' blocks fetched on request.

Life cycle: ``start`` registers and publishes (raises when it cannot), ``close`` withdraws. Each start has an epoch.
Threading: every method may be called from any thread; ``fetch`` returns at once. One worker thread makes all copies
and runs the callbacks; the store runs on a thread with an asyncio loop.
Time-outs: each transfer has a deadline, owned by the worker (``session/thread.py``); none outlives it by more
than ``grace_s``. Errors: ``start`` raises ``ConfigError``, ``TransferUnavailable`` or ``TransferError``; a
transfer's error comes through its handle. A transfer that names an old epoch or unequal layouts ends before a
byte moves.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable, Generator, Sequence
from typing import Literal

import numpy as np

from components import credentials
from components.address import is_loopback
from components.errors import (
    IncompatibleLayout,
    IntegrityError,
    MigrateError,
    PeerUnknown,
    StaleEpoch,
    TransferCancelled,
    TransferError,
)
from components.transfer.assemble import Assembly, assemble
from components.transfer.checksum import BlockChecksums
from components.transfer.config import AgentConfig, KVPool, TransferResult
from components.transfer.control.directory import Directory
from components.transfer.control.publisher import Publisher
from components.transfer.control.record import AgentRecord
from components.transfer.data.base import Backend, Copy, Steps
from components.transfer.handle import TransferHandle
from components.transfer.heads import divides, places
from components.transfer.ids import AgentName, AgentRef, Epoch
from components.transfer.layout import Ints, Region
from components.transfer.session.thread import EAGER, SPARING, Job, TransferThread
from components.transfer.session.unsafe import UnsafeBlocks
from components.transfer.shares import Share, Shares

logger = logging.getLogger(__name__)

_KNOWN_S = 5.0
"""Wait for the record of an unknown peer."""
_MANY_CORES = 8


class TransferAgent:
    """See the module docstring."""

    def __init__(self, config: AgentConfig) -> None:
        self._config = config
        self.epoch = Epoch(uuid.uuid4().hex)
        self.ref = AgentRef(AgentName(config.name), self.epoch)
        self.directory = Directory(self._meet)
        self.assembly = Assembly([], None)
        self._checksums = BlockChecksums(Shares([]))
        self._worker = TransferThread(config.name, config.grace_s)
        self._publisher = Publisher(config)
        self._unsafe = UnsafeBlocks()
        self._paired: dict[str, AgentRecord] = {}
        self._inline: set[str] = set()

    @property
    def lanes(self) -> tuple[str, ...]:
        """The ways this agent can move blocks, best first."""
        return tuple(backend.lane for backend in self.assembly.backends)

    def start(self, pools: Sequence[KVPool]) -> None:
        """Register the pools and publish. Raises ``ConfigError``, ``TransferUnavailable``, ``TransferError``."""
        self._config.validate()
        # An unreadable secret fails here and not at the first peer.
        if not credentials.secret() and not is_loopback(self._config.advertise_host):
            logger.warning(
                "agent %s is reached at %s and has no secret: whoever learns its epoch from etcd or NATS can read its "
                "KV blocks; give all processes one with %s",
                self._config.name,
                self._config.advertise_host,
                credentials.VARIABLE,
            )
        self.assembly = assemble(self._config, self.epoch, pools, self.directory)
        shares = self.assembly.shares
        self._checksums = BlockChecksums(shares)
        try:
            pace = EAGER if _has_cores_to_spare(shares.regions) else SPARING
            self._worker.start(self.assembly.backends, pace)
            self._publisher.start(self.record, self.directory)
        except MigrateError:
            self.close()
            raise

    @property
    def record(self) -> AgentRecord:
        """What peers know of this agent. Raises ``TransferError`` before ``start``."""
        if self.assembly.record is None:
            raise TransferError("the agent has not been started")
        return self.assembly.record

    def fetch(
        self,
        peer: AgentRef,
        remote_blocks: Sequence[int],
        local_blocks: Sequence[int],
        *,
        request_id: str,
        deadline_s: float,
    ) -> TransferHandle:
        """Copy the peer's ``remote_blocks`` into the local ``local_blocks``, pairwise.

        From a peer of another tensor-parallel size come the heads for which this agent is to ask it (``sources``).
        """
        logger.debug("request %s: fetching %d blocks from %s", request_id, len(remote_blocks), peer.name)
        handle = TransferHandle()
        end = time.monotonic() + deadline_s
        steps = self._run(peer, local_blocks, remote_blocks, request_id, end, handle)
        self._worker.submit(Job(steps, handle, end), inline=peer.epoch in self._inline)
        return handle

    def warm_up(self, peer: AgentRef, deadline_s: float = 60.0) -> TransferHandle:
        """Connect to a peer ahead of the first transfer: first contact can take seconds."""
        handle = TransferHandle()
        end = time.monotonic() + deadline_s
        self._worker.submit(Job(self._warm_up(peer, end), handle, end))
        return handle

    def checksums(self, blocks: Sequence[int]) -> tuple[int, ...]:
        """Checksums of our blocks: ``checksum_units`` for each, block after block."""
        return self._checksums.of(np.asarray(blocks, np.int64).tolist())

    def begin_checksums(self, blocks: Sequence[int]) -> Callable[[], tuple[int, ...]]:
        """``checksums`` of blocks that the device may still compute: queued behind that work, without waiting."""
        return self._checksums.begin(np.asarray(blocks, np.int64).tolist())

    @property
    def checksum_units(self) -> int:
        """Checksums of a block: one for each KV head here, or one for all of it where blocks do not divide."""
        return self._checksums.units

    def sources(self, size: int) -> tuple[int, ...]:
        """Ranks of an engine with ``size`` ranks from which this agent fetches a block.

        Raises ``IncompatibleLayout`` where blocks do not divide into heads.
        """
        return tuple(sorted({rank for rank, _ in self._places(size)}))

    def expected(self, sums: Sequence[Sequence[int]]) -> tuple[int, ...]:
        """The checksums that this agent's copy of a block must have, from those of each rank of its source."""
        try:
            return tuple(sums[rank][place] for rank, place in self._places(len(sums)))
        except IndexError:
            raise IntegrityError("the source has sent fewer checksums than it has KV heads") from None

    def _places(self, size: int) -> list[tuple[int, int]]:
        own = self.assembly.shares
        if size == own.rank.size:
            return [(own.rank.number, place) for place in range(self.checksum_units)]
        heads = [pool.heads for pool in own.pools]
        if not heads or not size or not all(divides(count, size) for count in heads):
            raise IncompatibleLayout(
                f"agent {self._config.name} is one of {own.rank.size} ranks and the source has {size}; KV caches of "
                "this model do not divide into as many ranks"
            )
        return places(heads, own.rank, size)

    def known_peers(self) -> list[str]:
        """Names of all agents that have published, ours included."""
        return self.directory.names()

    def unsafe_blocks(self) -> frozenset[int]:
        """Blocks that a hanging peer may still write to: unusable for now."""
        return self._unsafe.blocks()

    def _run(
        self,
        ref: AgentRef,
        local_blocks: Sequence[int],
        remote_blocks: Sequence[int],
        request_id: str,
        end: float,
        handle: TransferHandle,
    ) -> Steps:
        local, remote = np.asarray(local_blocks, np.int64), np.asarray(remote_blocks, np.int64)
        self.record.require_blocks(local, unique=True)
        if ref == self.ref:
            raise TransferError(f"agent {ref.name} cannot transfer to itself")
        peer = yield from self._peer(ref, end)
        share = self._share(peer)
        peer.require_blocks(remote, unique=False)
        if len(local) != len(remote):
            raise TransferError(f"{len(local)} local blocks for {len(remote)} of the peer")

        def mark_unsafe() -> Callable[[], None]:
            return self._mark_unsafe(handle, local)

        copy = Copy(peer, share, local, remote, request_id, end, mark_unsafe)
        if not len(local):
            return TransferResult(lane=self._backend(peer).lane)
        return (yield from self._on_a_lane(copy, "fetch"))

    def _meet(self, record: AgentRecord) -> None:
        """Connect to every peer as soon as it is known, so that its first transfer need not."""
        own = self.assembly.record
        if own is None or record.name == own.name:
            return
        try:
            self._share(record)
        except IncompatibleLayout:
            return  # ``fetch`` raises it again, with the reason.

        def met(handle: TransferHandle) -> None:
            try:
                logger.debug("agent %s connected in %.3f s", record.name, handle.wait(0).wire_s)
            except MigrateError as error:
                logger.info("agent %s is not connected yet: %s", record.name, error)

        self.warm_up(record.ref).add_done_callback(met)

    def _share(self, peer: AgentRecord) -> Share:
        """What this agent takes of a peer's blocks. Layouts are compared once for each record (0.2 ms, 80 layers)."""
        if self._paired.get(peer.name) is not peer:
            self.record.require_pairable(peer)
            self._paired[peer.name] = peer
        return self.assembly.shares.taken(peer)

    def _warm_up(self, ref: AgentRef, end: float) -> Steps:
        peer = yield from self._peer(ref, end)
        empty = np.empty(0, np.int64)
        return (yield from self._on_a_lane(Copy(peer, self._share(peer), empty, empty, "", end), "warm_up"))

    def _on_a_lane(self, copy: Copy, what: Literal["fetch", "warm_up"]) -> Steps:
        """Use the best lane; when it turns out not to reach the peer, the next one."""
        while True:
            backend = self._backend(copy.peer)
            way = backend.fetch if what == "fetch" else backend.warm_up
            try:
                result = yield from way(copy)
                if backend.inline:
                    self._inline.add(copy.peer.epoch)
                return result
            except TransferError as error:
                self._inline.discard(copy.peer.epoch)
                if isinstance(error, TransferCancelled) or backend.reaches(copy.peer):
                    raise
                logger.warning("agent %s: %s; using another lane", copy.peer.name, error)

    def _peer(self, ref: AgentRef, end: float) -> Generator[bool, None, AgentRecord]:
        until = min(end, time.monotonic() + _KNOWN_S)
        while (record := self.directory.get(ref.name)) is None:
            if time.monotonic() > until:
                known = ", ".join(self.known_peers()) or "none"
                raise PeerUnknown(f"no record of agent {ref.name}; known: {known}")
            yield False
        if record.epoch != ref.epoch:
            raise StaleEpoch(f"agent {ref.name} is in epoch {record.epoch[:8]}, the offer is of {ref.epoch[:8]}")
        return record

    def _backend(self, peer: AgentRecord) -> Backend:
        for backend in self.assembly.backends:
            if backend.reaches(peer):
                return backend
        raise TransferError(f"no common lane with agent {peer.name}: {self.lanes} here, {peer.lanes} there")

    def _mark_unsafe(self, handle: TransferHandle, blocks: Ints) -> Callable[[], None]:
        handle.unsafe_blocks = tuple(int(block) for block in blocks)
        return self._unsafe.add(handle.unsafe_blocks)

    def close(self) -> None:
        """Withdraw the record, end what is under way, give the pools back. Idempotent."""
        self._publisher.stop()
        self._worker.stop()
        for backend in self.assembly.backends:
            backend.close()
        self.assembly = Assembly([], None)


def _has_cores_to_spare(regions: Sequence[Region]) -> bool:
    """True on a GPU host, where a spinning worker gains more than a core is worth."""
    return any(region.device.type == "cuda" for region in regions) and len(os.sched_getaffinity(0)) >= _MANY_CORES
