# SPDX-License-Identifier: Apache-2.0
"""The transfer agent: pools registered once, one record published, blocks fetched on request.

Life cycle: ``start`` registers and publishes (raises when it cannot), ``close`` withdraws. One epoch a life.
Threading: ``fetch`` may be called from any thread and returns at once; all copies of an agent run one after
the other on its posting thread, the store's asyncio loop on another. Callbacks run on the posting thread.
Time-outs: each fetch has a deadline, which this module owns; no fetch outlives it.
Errors: ``TransferError`` and subclasses, always through the handle. A fetch that names an epoch other than
the peer's newest, or a peer whose layout differs, ends before a byte moves.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from components.engine.protocol import AgentName, AgentRef, Epoch
from components.errors import DeadlineExceeded, PeerUnknown, StaleEpoch, TransferCancelled, TransferError
from components.transfer import lanes
from components.transfer.checksum import BlockChecksums
from components.transfer.config import AgentConfig, KVPool, TransferResult, Transport, region_of
from components.transfer.control.record import AgentRecord, RegionRecord
from components.transfer.control.store import Directory, EtcdStore, MemoryStore, RecordStore
from components.transfer.data.base import Backend
from components.transfer.data.nixl import NixlBackend, nixl_is_available
from components.transfer.data.tcp import TcpBackend

logger = logging.getLogger(__name__)

_PASSIVE_WORK = frozenset({Transport.TCP, Transport.IB, Transport.NVLINK})
"""Lanes on which the side that is read from takes part in moving the bytes."""
_PROGRESS_S = 0.001


class TransferHandle:
    """One transfer under way. ``wait`` from a thread, ``await`` from asyncio, or a callback."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._result: TransferResult | None = None
        self._error: TransferError | DeadlineExceeded | None = None
        self._callbacks: list[Callable[[TransferHandle], None]] = []
        self._lock = threading.Lock()
        self.cancelled = False

    def done(self) -> bool:
        """True once there is a result or an error."""
        return self._done.is_set()

    def cancel(self) -> None:
        """Ask it to end; takes effect between two pieces."""
        self.cancelled = True

    def wait(self, timeout_s: float | None = None) -> TransferResult:
        """The result. Raises the transfer's error, or ``TimeoutError`` when it is still under way."""
        if not self._done.wait(timeout_s):
            raise TimeoutError(f"the transfer is still under way after {timeout_s} s")
        if self._error is not None:
            raise self._error
        if self._result is None:
            raise TransferError("the transfer ended without a result")
        return self._result

    def add_done_callback(self, callback: Callable[[TransferHandle], None]) -> None:
        """Call it once the transfer has ended; at once when it already has."""
        with self._lock:
            if not self.done():
                self._callbacks.append(callback)
                return
        callback(self)

    def __await__(self) -> Generator[Any, None, TransferResult]:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def wake(_: TransferHandle) -> None:
            loop.call_soon_threadsafe(lambda: None if ended.done() else ended.set_result(None))

        self.add_done_callback(wake)
        yield from ended
        return self.wait(0)

    def settle(self, result: TransferResult | None, error: TransferError | DeadlineExceeded | None) -> None:
        """End it. Called by the agent alone."""
        with self._lock:
            self._result, self._error = result, error
            self._done.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(self)


@dataclass(frozen=True)
class _Fetch:
    peer: AgentRef
    src: tuple[int, ...]
    dst: tuple[int, ...]
    end: float
    handle: TransferHandle = field(default_factory=TransferHandle)


class TransferAgent:
    """See the module docstring."""

    def __init__(self, config: AgentConfig) -> None:
        self._config = config
        self.epoch = Epoch(uuid.uuid4().hex)
        self.ref = AgentRef(AgentName(config.name), self.epoch)
        self.directory = Directory()
        self._backends: list[Backend] = []
        self._record: AgentRecord | None = None
        self._checksums = BlockChecksums([])
        self._queue: queue.SimpleQueue[_Fetch | None] = queue.SimpleQueue()
        self._poster: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._publisher: threading.Thread | None = None
        self._stop_publishing: Callable[[], object] = lambda: None

    @property
    def lanes(self) -> tuple[str, ...]:
        """The ways this agent can move blocks, best first."""
        return tuple(backend.lane for backend in self._backends)

    def start(self, pools: Sequence[KVPool]) -> None:
        """Register the pools and publish. Raises ``TransferUnavailable`` or ``TransferError``."""
        config = self._config
        lanes.apply(config.transport)
        regions = [region_of(pool) for pool in pools]
        available, why = nixl_is_available()
        if available:
            lane = f"nixl/ucx/{config.transport}"
            name = f"{config.name}/{self.epoch}"
            on_device = bool(pools) and pools[0].tensor.is_cuda
            own_thread = on_device or config.transport in _PASSIVE_WORK
            self._backends.append(NixlBackend(name, regions, config.piece_bytes, lane, own_thread))
        else:
            logger.warning("NIXL is not used: %s; falling back to plain TCP", why)
        self._backends.append(TcpBackend(self.epoch, pools, config.advertise_host))
        self._checksums = BlockChecksums(pools)
        described = [backend.describe() for backend in self._backends]
        self._record = AgentRecord(
            name=config.name,
            epoch=self.epoch,
            blob=next((blob for blob, _ in described if blob), b""),
            tcp_address=next((address for _, address in described if address), ""),
            fingerprint=config.fingerprint,
            block_size=config.block_size,
            dtype=config.dtype,
            layers=config.layers,
            num_blocks=pools[0].num_blocks if pools else 0,
            tp_rank=config.tp_rank,
            tp_size=config.tp_size,
            regions=tuple(
                RegionRecord(
                    r.name,
                    r.tensor.device.type,
                    r.tensor.device.index or 0,
                    tuple((s.address, s.stride, s.length) for s in r.segments),
                )
                for r in regions
            ),
            lanes=self.lanes,
        )
        self._poster = threading.Thread(target=self._post_loop, name="kv-post", daemon=True)
        self._poster.start()
        self._publish()

    def _publish(self) -> None:
        config = self._config
        store: RecordStore
        if config.etcd_endpoints:
            store = EtcdStore(
                config.etcd_endpoints, config.namespace, config.lease_ttl_s, config.etcd_user, config.etcd_password
            )
        else:
            store = MemoryStore(config.namespace)
        published = threading.Event()

        def run() -> None:
            asyncio.run(self._keep_published(store, published.set))

        self._publisher = threading.Thread(target=run, name="kv-records", daemon=True)
        self._publisher.start()
        if not published.wait(15.0):
            raise TransferError(
                f"the record of agent {config.name} could not be published at {list(config.etcd_endpoints)}: "
                "is etcd running, and are the credentials right?"
            )

    async def _keep_published(self, store: RecordStore, published: Callable[[], None]) -> None:
        if self._record is None:
            return
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(store.run(self._record, self.directory, published))
        self._stop_publishing = lambda: loop.call_soon_threadsafe(task.cancel)
        try:
            await task
        except asyncio.CancelledError:
            logger.debug("agent %s is withdrawn", self._config.name)

    def fetch(
        self,
        peer: AgentRef,
        src_blocks: Sequence[int],
        dst_blocks: Sequence[int],
        *,
        request_id: str,
        deadline_s: float,
    ) -> TransferHandle:
        """Copy the peer's blocks into ours, pairwise. ``request_id`` is for logs."""
        work = _Fetch(peer, tuple(src_blocks), tuple(dst_blocks), time.monotonic() + deadline_s)
        logger.debug("request %s: fetching %d blocks from %s", request_id, len(work.src), peer.name)
        self._queue.put(work)
        return work.handle

    def checksums(self, blocks: Sequence[int]) -> tuple[int, ...]:
        """One checksum for each of our blocks, over all pools."""
        return self._checksums.of(blocks)

    def known_peers(self) -> list[str]:
        """Names of all agents that have published, ours included."""
        return self.directory.names()

    def _post_loop(self) -> None:
        while True:
            try:
                work = self._queue.get(timeout=_PROGRESS_S)
            except queue.Empty:
                for backend in self._backends:
                    backend.progress()
                continue
            if work is None:
                return
            try:
                result = self._run(work)
            except (TransferError, DeadlineExceeded) as error:
                work.handle.settle(None, error)
            except Exception as error:
                # The posting thread must survive whatever a library raises, or every later fetch hangs.
                logger.exception("a transfer from %s failed", work.peer.name)
                work.handle.settle(None, TransferError(str(error)))
            else:
                work.handle.settle(result, None)

    def _run(self, work: _Fetch) -> TransferResult:
        if work.handle.cancelled:
            raise TransferCancelled("cancelled before it began")
        left = work.end - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded("the deadline passed while earlier transfers were under way")
        if self._record is None:
            raise TransferError("the agent has not been started")
        self._check_blocks(work, self._record)
        peer = self._peer(work.peer, left)
        self._record.require_pairable(peer)
        if any(not 0 <= block < peer.num_blocks for block in work.src):
            raise TransferError(f"agent {peer.name} has {peer.num_blocks} blocks; asked for {max(work.src)}")
        backend = next((b for b in self._backends if b.reaches(peer)), None)
        if backend is None:
            raise TransferError(f"no common lane with agent {peer.name}: {self.lanes} here, {peer.lanes} there")
        left = work.end - time.monotonic()
        return backend.read(peer, work.src, work.dst, left, lambda: work.handle.cancelled)

    def _check_blocks(self, work: _Fetch, record: AgentRecord) -> None:
        if len(work.src) != len(work.dst):
            raise TransferError(f"{len(work.src)} source blocks for {len(work.dst)} of ours")
        if len(set(work.dst)) != len(work.dst):
            raise TransferError("a local block is named twice")
        if any(not 0 <= block < record.num_blocks for block in work.dst):
            raise TransferError(f"a local block is not among our {record.num_blocks}")

    def _peer(self, ref: AgentRef, timeout_s: float) -> AgentRecord:
        record = self.directory.wait(ref.name, min(timeout_s, 5.0))
        if record is None:
            raise PeerUnknown(f"no record of agent {ref.name}; known: {', '.join(self.known_peers()) or 'none'}")
        if record.epoch != ref.epoch:
            raise StaleEpoch(f"agent {ref.name} is in epoch {record.epoch}, the offer is of {ref.epoch}")
        return record

    def close(self) -> None:
        """Withdraw the record, finish what is under way, give the pools back."""
        self._stop_publishing()
        self._queue.put(None)
        for thread in (self._publisher, self._poster):
            if thread is not None:
                thread.join(5.0)
        for backend in self._backends:
            backend.close()
        self._backends.clear()
