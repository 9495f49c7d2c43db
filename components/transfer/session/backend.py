# SPDX-License-Identifier: Apache-2.0
"""The NIXL lane: READ, WRITE on request, or staged, chosen for each transfer.

Implements ``Backend``; the messages and their order are in ``messages.py``. Runs on the worker thread.
READ serves host memory, WRITE device memory in long runs (a remote GET of device memory without NVLink
falls back to TCP), staging device memory in short runs and wires with a cost for each descriptor.
A source writes for an ``Ask`` only within its budget and always sends ``Ended``: the destination fails a
transfer only after that message, or after the worker's grace, and then marks the blocks as unsafe. Staged
transfers leave no unsafe blocks: the peer writes into slots, never into blocks.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from collections.abc import Callable, Generator

from components.errors import DeadlineExceeded, MigrateError, TransferError, TransferUnavailable, from_code
from components.transfer.config import AgentConfig, Strategy, TransferResult
from components.transfer.control.directory import Directory
from components.transfer.control.record import AgentRecord
from components.transfer.data.base import Backend, Copy, Steps
from components.transfer.data.nixl import Moved
from components.transfer.data.staging import Staging
from components.transfer.layout import runs
from components.transfer.session import messages as wire
from components.transfer.session.receive import StagedReceive
from components.transfer.session.serve import serve_write
from components.transfer.session.side import LANE, Inbox, Side

logger = logging.getLogger(__name__)

_DIRECT_BYTES = {"cuda": 2 << 20, "cpu": 0}
"""Mean run from which direct descriptors beat staging (docs/design-notes.md)."""


class NixlBackend(Backend):
    """See the module docstring."""

    lane = LANE

    def __init__(self, config: AgentConfig, side: Side, directory: Directory) -> None:
        self.side = side
        self._config = config
        self.strategy = config.strategy
        self._directory = directory
        self._ids = itertools.count(secrets.randbits(60))
        self.inboxes: dict[tuple[str, int], Inbox] = {}
        self._quarantine: dict[tuple[str, int], Callable[[], None]] = {}

    def reaches(self, peer: AgentRecord) -> bool:
        """True when the peer has NIXL as well."""
        return bool(peer.blob)

    def fetch(self, copy: Copy) -> Steps:
        """See ``Backend``."""
        strategy = self.choose(copy)
        if strategy is Strategy.READ:
            return self._direct(copy, "READ", Strategy.READ)
        if strategy is Strategy.STAGED:
            if self.side.staging is None or not copy.peer.stages:
                raise TransferUnavailable(f"agents {self._config.name} and {copy.peer.name} have no staging memory")
            return self._fetch_staged(copy, self.side.staging)
        return self._ask_direct(copy)

    def choose(self, copy: Copy) -> Strategy:
        """The strategy for these blocks."""
        if self.strategy is not Strategy.AUTO:
            return self.strategy
        device = copy.peer.regions[0].device if copy.peer.regions[0].device == "cuda" else self._device()
        direct = Strategy.READ if device == "cpu" else Strategy.WRITE
        can_stage = self.side.staging is not None and copy.peer.stages and len(copy.local)
        if can_stage and self._mean_run(copy) < (self._config.direct_bytes or _DIRECT_BYTES.get(device, 0)):
            return Strategy.STAGED
        return direct

    def _device(self) -> str:
        return "cuda" if self.side.link.memory == "VRAM" else "cpu"

    def _mean_run(self, copy: Copy) -> float:
        per_block = copy.share.block_bytes / len(copy.share.local)
        return per_block * len(copy.local) / max(1, len(runs(copy.remote, copy.local)[0]))

    def _direct(self, copy: Copy, operation: str, strategy: Strategy) -> Steps:
        start = time.perf_counter()
        memory = self.side.memory(copy)
        moved = Moved(prep_s=time.perf_counter() - start)
        yield from self.side.link.move(operation, copy.peer, memory, moved, copy.mark_unsafe)
        return self.result(moved, strategy, self.side.lane_of(operation, copy.peer))

    def result(self, moved: Moved | wire.Ended, strategy: Strategy, lane: str) -> TransferResult:
        """Figures of a move as a result."""
        return TransferResult(moved.bytes, moved.descriptors, moved.prep_s, moved.post_s, moved.wire_s, lane, strategy)

    def _open(self, peer: AgentRecord) -> tuple[int, Inbox]:
        number = next(self._ids)
        inbox = self.inboxes[peer.key, number] = Inbox()
        return number, inbox

    def _ask(self, copy: Copy, number: int, slots: tuple[int, ...], slot_bytes: int) -> wire.Ask:
        dst = b"" if slots else wire.pack(copy.local)
        budget = max(1, int((copy.end - time.monotonic()) * 1000))
        request = copy.request_id[:1024]
        src = wire.pack(copy.remote)
        return wire.Ask(number, request, src, dst, slots, slot_bytes, budget)

    def _ask_direct(self, copy: Copy) -> Steps:
        number, inbox = self._open(copy.peer)
        asked = False
        try:
            self.side.send(copy.peer, self._ask(copy, number, (), 0))
            asked = True
            yield True
            yield from self._until(copy, number, inbox, lambda: _over(inbox))
            ended = _require(inbox)
            return self.result(ended, Strategy.WRITE, ended.lane or self.lane)
        finally:
            if asked and inbox.ended is None:
                self._quarantine[copy.peer.key, number] = copy.mark_unsafe()
            del self.inboxes[copy.peer.key, number]

    def _until(self, copy: Copy, number: int, inbox: Inbox, done: Callable[[], bool]) -> Generator[bool, None, None]:
        # A failed transfer stops the source and waits for its ``Ended``.
        try:
            while not done():
                record = self._directory.get(copy.peer.name)
                if record is None or record.epoch != copy.peer.epoch:
                    raise TransferError(f"agent {copy.peer.name} is gone")
                yield False
        except MigrateError:
            self._stop(copy.peer, number)
            while inbox.ended is None:
                yield False
            raise

    def _stop(self, peer: AgentRecord, number: int) -> None:
        try:
            self.side.send(peer, wire.Stop(number))
        except TransferError as error:
            logger.debug("agent %s could not be told to stop: %s", peer.name, error)

    def _fetch_staged(self, copy: Copy, staging: Staging) -> Steps:
        while not (slots := staging.acquire("receive", staging.side)):
            yield False
        number, inbox = self._open(copy.peer)
        receive = StagedReceive(
            staging, copy, slots, lambda chunk: self.side.send(copy.peer, wire.Freed(number, chunk))
        )
        asked = False
        try:
            addresses = tuple(staging.address(slot) for slot in slots)
            self.side.send(copy.peer, self._ask(copy, number, addresses, staging.slot_bytes))
            asked = True
            yield True
            yield from self._until(copy, number, inbox, lambda: _received(inbox, receive))
            ended = _require(inbox)
            if not receive.done:
                raise TransferError(f"agent {copy.peer.name} ended a transfer too early")
            return self.result(ended, Strategy.STAGED, ended.lane or self.lane)
        finally:
            receive.settle()
            if asked and inbox.ended is None:
                # A hanging peer may still write into these slots: its ``Ended`` releases them.
                self._quarantine[copy.peer.key, number] = lambda: staging.release("receive", slots)
            else:
                staging.release("receive", slots)
            del self.inboxes[copy.peer.key, number]

    def warm_up(self, copy: Copy) -> Steps:
        """Load metadata, connect both ways."""
        number, inbox = self._open(copy.peer)
        start = time.perf_counter()
        try:
            self.side.prepare(copy.share)
            self.side.send(copy.peer, wire.Hello(number, reply=True))
            while not inbox.greeted:
                yield False
            return TransferResult(wire_s=time.perf_counter() - start, lane=self.lane)
        finally:
            del self.inboxes[copy.peer.key, number]

    def progress(self) -> list[Generator[bool, None, None]]:
        """See ``Backend``."""
        new = []
        for sender, batch in self.side.link.poll().items():
            for data in batch:
                try:
                    service = self._receive(sender, wire.decode(data, sender, self.side.key))
                except TransferError as error:
                    logger.warning("a message from %s: %s", _name(sender), error)
                    continue
                if service is not None:
                    new.append(service)
        return new

    def _receive(self, sender: str, message: wire.Message) -> Generator[bool, None, None] | None:
        inbox = self.inboxes.get((sender, message.id))
        match message:
            case wire.Ask() | wire.Hello(reply=True):
                # The id of a local transfer cannot begin a served one.
                return self._with_peer(sender, message) if inbox is None else None
            case wire.Hello() if inbox is not None:
                inbox.greeted = True
            case wire.Landed() if inbox is not None:
                inbox.landed.add(message.chunk)
            case wire.Freed() if inbox is not None:
                inbox.freed.add(message.chunk)
            case wire.Ended() if inbox is not None:
                inbox.ended = message
            case wire.Stop() if inbox is not None:
                inbox.stopped = True
            case wire.Ended() if (sender, message.id) in self._quarantine:
                self._quarantine.pop((sender, message.id))()
            case _:
                logger.debug("agent %s: %s for a transfer that is over", _name(sender), type(message).__name__)
        return None

    def _with_peer(self, sender: str, message: wire.Ask | wire.Hello) -> Generator[bool, None, None]:
        # A message of a new peer may arrive before its record.
        name, _, epoch = sender.rpartition("/")
        end = time.monotonic() + 5.0
        inbox = self.inboxes[sender, message.id] = Inbox()
        peer: AgentRecord | None = None
        try:
            while (peer := self._directory.get(name)) is None or peer.epoch != epoch:
                if time.monotonic() > end:
                    logger.warning("agent %s sent a request but has published no record", name)
                    return
                yield False
            if isinstance(message, wire.Hello):
                self.side.prepare(self.side.shares.given(peer))
                self.side.send(peer, wire.Hello(message.id, reply=False))
            else:
                yield from serve_write(self.side, peer, message, inbox)
        except TransferError as error:
            logger.warning("serving agent %s: %s", name, error)
        except Exception as error:
            # Without an answer the peer would wait until its deadline.
            logger.exception("serving agent %s", name)
            if peer is not None:
                self.side.send(
                    peer, wire.Ended(message.id, TransferError.code, f"{type(error).__name__}: {error}"[:1024])
                )
        finally:
            self.inboxes.pop((sender, message.id), None)

    def close(self) -> None:
        """See ``Backend``."""
        self.side.link.close()


def _name(sender: str) -> str:
    return sender.rpartition("/")[0][:200]


def _over(inbox: Inbox) -> bool:
    return inbox.ended is not None


def _received(inbox: Inbox, receive: StagedReceive) -> bool:
    receive.step(inbox.landed)
    ended = inbox.ended
    return ended is not None and (bool(ended.code) or receive.idle)


def _require(inbox: Inbox) -> wire.Ended:
    if inbox.ended is None:
        raise TransferError("the peer did not say how the transfer ended")
    if inbox.ended.code:
        error = from_code(inbox.ended.code, inbox.ended.message)
        raise error if isinstance(error, TransferError | DeadlineExceeded) else TransferError(str(error))
    return inbox.ended
