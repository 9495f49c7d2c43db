# SPDX-License-Identifier: Apache-2.0
"""Park a request's blocks in host memory or in a file, and bring them back.

``park`` and ``restore`` are transfers like any other: each returns a handle at once and has a deadline, cancel,
progress and a callback; the agent's worker steps them. The blocks must not change before ``park`` is done; those given
to ``restore`` must not be used before it is done, nor after it failed. A parked request stays until it is restored
(``keep`` leaves it) or ``discard``ed; in memory at most until the agent closes.
Agent epoch, ticket, layout and the caller's block hashes are checked before a byte moves, a checksum of every block
after. Errors: ``NoRoom`` (bound or disk full: nothing was parked), ``RequestNotFound``, ``StaleEpoch``,
``IncompatibleLayout``, ``IntegrityError``, ``TransferUnavailable`` (that place is not configured). All are counted.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from components.errors import IntegrityError, MigrateError, StaleEpoch, TransferError, TransferUnavailable
from components.transfer.checksum import BlockChecksums
from components.transfer.config import AgentConfig, Strategy, TransferResult
from components.transfer.control.record import AgentRecord
from components.transfer.data.base import Steps
from components.transfer.handle import TransferHandle
from components.transfer.layout import Ints, Region, groups_of
from components.transfer.parking.files import FileShelf
from components.transfer.parking.folder import Folder
from components.transfer.parking.host import HostShelf
from components.transfer.parking.loading import Loader
from components.transfer.parking.ticket import FITS, Place, Ticket, layout_of

Submit = Callable[[Steps, TransferHandle, float], None]
Shelf = HostShelf | FileShelf
_COPIED = ("epoch", *FITS)


@dataclass(frozen=True)
class ParkingStats:
    """Counts since the agent's start; bytes in use now."""

    parked: int = 0
    restored: int = 0
    discarded: int = 0
    used_bytes: dict[Place, int] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    """By error code: ``no_room``, ``integrity``, ``stale_epoch``, ..."""


def parking_of(
    config: AgentConfig, record: AgentRecord, regions: Sequence[Region], checksums: BlockChecksums, submit: Submit
) -> Parking:
    """The configured parking. Raises ``ConfigError`` for an unusable folder."""
    shelves: dict[Place, Shelf] = {}
    if not config.park_host_bytes and not config.park_dir:
        return Parking(record, None, shelves, checksums, submit)
    loader = Loader(regions)
    if config.park_host_bytes:
        shelves[Place.HOST] = HostShelf(loader, config.park_host_bytes)
    if config.park_dir:
        folder = Folder(config.park_dir, config.park_dir_bytes)
        shelves[Place.FILE] = FileShelf(loader, folder, record.key, nixl="nixl" in config.backends)
    return Parking(record, loader, shelves, checksums, submit)


class Parking:
    """See the module docstring."""

    def __init__(
        self,
        record: AgentRecord,
        loader: Loader | None,
        shelves: dict[Place, Shelf],
        checksums: BlockChecksums,
        submit: Submit,
    ) -> None:
        self._record = record
        self._loader = loader
        self._shelves = shelves
        self._checksums = checksums
        self._submit = submit
        self._counts: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def places(self) -> tuple[Place, ...]:
        """Places in which this agent can park."""
        return tuple(self._shelves)

    def park(
        self,
        place: Place,
        blocks: Sequence[int],
        *,
        request_id: str,
        deadline_s: float,
        tokens: int = 0,
        block_hashes: Sequence[bytes] = (),
        on_done: Callable[[TransferHandle], None] | None = None,
    ) -> TransferHandle:
        """Copy blocks to a place. The result's ``ticket`` brings them back."""
        source = np.asarray(blocks, np.int64)

        def steps(handle: TransferHandle) -> Steps:
            return self._park(place, source, request_id, tokens, tuple(block_hashes), handle)

        return self._start(steps, "parked", deadline_s, on_done)

    def restore(
        self,
        ticket: Ticket,
        blocks: Sequence[int],
        *,
        deadline_s: float,
        block_hashes: Sequence[bytes] = (),
        keep: bool = False,
        on_done: Callable[[TransferHandle], None] | None = None,
    ) -> TransferHandle:
        """Copy all parked blocks into ``blocks``, pairwise. ``block_hashes`` must be those of parking."""
        target = np.asarray(blocks, np.int64)

        def steps(handle: TransferHandle) -> Steps:
            return self._restore(ticket, target, tuple(block_hashes), keep, handle)

        return self._start(steps, "restored", deadline_s, on_done)

    def discard(self, ticket: Ticket, deadline_s: float = 10.0) -> TransferHandle:
        """Drop a parked request. Does nothing when it is gone."""
        return self._start(lambda _: self._discard(ticket), "", deadline_s, None)

    def tickets(self) -> list[Ticket]:
        """Tickets that this agent can restore; reads the folder on the calling thread."""
        return [ticket for shelf in self._shelves.values() for ticket in shelf.tickets()]

    def stats(self) -> ParkingStats:
        """Figures for logs and metrics."""
        used = {place: shelf.used_bytes for place, shelf in self._shelves.items()}
        with self._lock:
            counts = {name: self._counts[name] for name in ("parked", "restored", "discarded")}
            return ParkingStats(used_bytes=used, failures=dict(self._failures), **counts)

    def close(self) -> None:
        """Drop what is in memory; files stay."""
        for shelf in self._shelves.values():
            shelf.close()

    def _start(
        self,
        steps: Callable[[TransferHandle], Steps],
        counted: str,
        deadline_s: float,
        on_done: Callable[[TransferHandle], None] | None,
    ) -> TransferHandle:
        handle = TransferHandle()
        handle.add_done_callback(lambda ended: self._count(ended, counted))
        if on_done is not None:
            handle.add_done_callback(on_done)
        self._submit(steps(handle), handle, time.monotonic() + deadline_s)
        return handle

    def _count(self, ended: TransferHandle, counted: str) -> None:
        try:
            ended.wait(0)
        except MigrateError as error:
            with self._lock:
                self._failures[error.code] += 1
        else:
            with self._lock:
                self._counts[counted] += bool(counted)

    def _shelf(self, place: Place) -> tuple[Shelf, Loader]:
        if place not in self._shelves or self._loader is None:
            setting = {Place.HOST: "park_host_bytes", Place.FILE: "park_dir"}[place]
            raise TransferUnavailable(f"this agent has nowhere to park ({place}): set {setting}")
        return self._shelves[place], self._loader

    def _park(
        self,
        place: Place,
        blocks: Ints,
        request_id: str,
        tokens: int,
        hashes: tuple[bytes, ...],
        handle: TransferHandle,
    ) -> Steps:
        (shelf, loader), record = self._shelf(place), self._record
        record.require_blocks(blocks, unique=False)
        if not len(blocks) or (hashes and len(hashes) != len(blocks)):
            raise TransferError(f"{len(blocks)} blocks with {len(hashes)} hashes cannot be parked")
        handle.total = len(blocks) * loader.block_bytes
        begun = time.perf_counter()
        sums: dict[int, tuple[int, ...]] = {}
        ticket_id = uuid.uuid4().hex
        chunks = groups_of(len(blocks), loader.chunk_blocks)

        def done(number: int) -> None:
            first, last = chunks[number]
            sums[number] = self._checksums.of(blocks[first:last].tolist())
            handle.progress += (last - first) * loader.block_bytes

        made: list[Ticket] = []

        def ticket() -> Ticket:
            values = {name: getattr(record, name) for name in _COPIED}
            made.append(
                Ticket(
                    id=ticket_id,
                    place=place,
                    agent=record.name,
                    request_id=request_id[:1024],
                    tokens=tokens or len(blocks) * record.block_size,
                    layout=layout_of(record),
                    block_bytes=loader.block_bytes,
                    chunk_blocks=loader.chunk_blocks,
                    hashes=hashes,
                    checksums=tuple(value for number in range(len(chunks)) for value in sums[number]),
                    **values,
                )
            )
            return made[0]

        yield from shelf.put(ticket_id, loader.index(blocks), chunks, done, ticket)
        return _result(made[0], shelf, time.perf_counter() - begun)

    def _restore(
        self, ticket: Ticket, blocks: Ints, hashes: tuple[bytes, ...], keep: bool, handle: TransferHandle
    ) -> Steps:
        (shelf, loader), record = self._shelf(ticket.place), self._record
        record.require_blocks(blocks, unique=True)
        if ticket.place is Place.HOST and ticket.epoch != record.epoch:
            raise StaleEpoch(f"parked in epoch {ticket.epoch[:8]} of agent {ticket.agent}; its memory is gone")
        ticket.require_fit(record, hashes)
        if len(blocks) != len(ticket.checksums):
            raise TransferError(f"{len(ticket.checksums)} blocks are parked, {len(blocks)} were given for them")
        if ticket.chunk_blocks > loader.chunk_blocks:
            raise TransferError(
                f"request {ticket.request_id} is parked in groups of {ticket.chunk_blocks} blocks, "
                f"buffers hold {loader.chunk_blocks}"
            )
        handle.total = ticket.total_bytes
        begun = time.perf_counter()
        chunks = ticket.chunks()

        def done(number: int) -> None:
            first, last = chunks[number]
            found = self._checksums.of(blocks[first:last].tolist())
            for at, (here, parked) in enumerate(zip(found, ticket.checksums[first:last], strict=True), first):
                if here != parked:
                    raise IntegrityError(
                        f"block {at} of parked request {ticket.request_id} has changed since it was parked"
                    )
            handle.progress += (last - first) * ticket.block_bytes

        yield from shelf.get(ticket, loader.index(blocks), chunks, done)
        wire = time.perf_counter() - begun
        if not keep:
            yield from shelf.drop(ticket)
        return _result(ticket, shelf, wire)

    def _discard(self, ticket: Ticket) -> Steps:
        shelf, _ = self._shelf(ticket.place)
        if (yield from shelf.drop(ticket)):
            with self._lock:
                self._counts["discarded"] += 1
        return TransferResult(lane=shelf.lane)


def _result(ticket: Ticket, shelf: Shelf, wire_s: float) -> TransferResult:
    """Result of a transfer that has moved all blocks of the ticket, either way."""
    return TransferResult(
        ticket.total_bytes,
        len(ticket.chunks()),
        wire_s=wire_s,
        lane=shelf.lane,
        strategy=Strategy.STAGED,
        verified_blocks=len(ticket.checksums),
        ticket=ticket,
    )
