# SPDX-License-Identifier: Apache-2.0
"""Blocks between GPUs over NCCL, for pairs that neither CUDA IPC nor NIXL serves: gathered, sent, scattered.

Life cycle: an agent opens a link (socket and communicator, ``nccl_link.py``) to a peer on first contact, and again
after a loss. A transfer that is cancelled or fails midway ends its link. When a link cannot be made, or is lost twice
in a row, the next lane serves that epoch of the peer.
Threading: the worker thread selects and steps; each transfer, each set-up and each served link has a thread.
At most one transfer sends and one receives at a time: each takes all slots of its side, and a peer without free slots
answers so at once, so that no two agents wait for each other. Slots that NCCL may still write to are never used again;
the lane is then off.
"""

from __future__ import annotations

import logging
import random
import socket
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from components.acceptor import Acceptor
from components.address import Address, bare, listen
from components.errors import DeadlineExceeded, MigrateError, TransferCancelled, TransferError
from components.frames import hear, is_open, say
from components.handshake import connect
from components.transfer.config import Strategy, TransferResult
from components.transfer.control.record import AgentRecord
from components.transfer.data import nccl_wire
from components.transfer.data.base import Copy, Steps
from components.transfer.data.nccl_line import Card, Line, Slots, paused, wait_for
from components.transfer.data.nccl_link import MAX_FRAME, Answer, Ask, Hello, Link, Patience, Stopped
from components.transfer.data.threads import on_thread
from components.transfer.layout import Region
from components.transfer.session.messages import pack, unpack
from components.wire import UNREADABLE

logger = logging.getLogger(__name__)
_SET_UP_S = 60.0
_LOSSES = 2
_LOOK_S = 1.0
_AGAIN_S = 2e-3
_SAY_S = 5.0


class NcclBackend:
    """See the module docstring."""

    lane = "nccl/send-recv"
    inline = False

    def __init__(
        self,
        name: str,
        epoch: str,
        regions: Sequence[Region],
        host: str,
        staging_bytes: int,
        card: Card,
        connect: nccl_wire.Connect = nccl_wire.connect,
        tp_size: int = 1,
    ) -> None:
        self._name = name
        self._tp_size = tp_size
        self._blocks = regions[0].rows[0].shape[0]
        self._slots = Slots(regions, staging_bytes)
        self._connect = connect
        self.card = card
        self._lines: dict[str, Line] = {}
        self._told: set[str] = set()
        self._links: set[Link] = set()
        """All open links, in both directions."""
        self._off = threading.Event()
        self._looked = 0.0
        nccl_wire.prepare_environment()
        server = listen(host)
        self.address = str(Address(bare(host), server.getsockname()[1]))
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="kv-nccl-out")
        self._acceptor = Acceptor(server, _purpose(epoch), self._serve, "kv-nccl")

    def reaches(self, peer: AgentRecord) -> bool:
        """True for a peer with the same NCCL version on another GPU, unless its links were lost."""
        if not peer.nccl_address or self._off.is_set():
            return False
        why = self._why_not(peer)
        if why and peer.key not in self._told:
            self._told.add(peer.key)
            logger.info("NCCL is not used with agent %s: %s", peer.name, why)
        return not why

    def _why_not(self, peer: AgentRecord) -> str:
        if peer.tp_size != self._tp_size:
            return f"it is one of {peer.tp_size} ranks, this agent of {self._tp_size}, and NCCL moves whole blocks"
        if peer.gpu == self.card.gpu:
            return f"both are on GPU {peer.gpu}, and NCCL takes no GPU twice"
        if peer.nccl_version != self.card.version:
            return f"it has version {peer.nccl_version}, this agent {self.card.version}"
        line = self._lines.get(peer.key)
        if line is not None and line.late:
            return "its link is still being made"
        return "its links were lost" if line is not None and line.losses >= _LOSSES else ""

    def fetch(self, copy: Copy) -> Steps:
        """See ``Backend``."""
        begun = time.perf_counter()
        line = self._line(copy.peer)

        def work(copy: Copy, stop: threading.Event) -> int:
            return self._guarded(line, copy, stop)

        size = yield from on_thread(self._pool, copy, work)
        wire_s = time.perf_counter() - begun
        return TransferResult(
            size, self._slots.chunks(len(copy.local)), wire_s=wire_s, lane=self.lane, strategy=Strategy.STAGED
        )

    def warm_up(self, copy: Copy) -> Steps:
        """Open the link."""
        return self.fetch(copy)

    def _line(self, peer: AgentRecord) -> Line:
        if peer.key not in self._lines:
            for key in [key for key, line in self._lines.items() if line.peer.name == peer.name]:
                self._retire(self._lines.pop(key))
            self._lines[peer.key] = Line(peer)
        return self._lines[peer.key]

    def _retire(self, line: Line) -> None:
        for link in line.take_links():
            threading.Thread(target=self._end, args=(link,), name="kv-nccl-end", daemon=True).start()

    def _end(self, link: Link) -> bool:
        ended = link.close()
        self._links.discard(link)
        if not ended:
            logger.error("NCCL did not end a communicator in time: its lane is off until this agent restarts")
            self._off.set()
        return ended

    def _guarded(self, line: Line, copy: Copy, stop: threading.Event) -> int:
        where = f"agent {copy.peer.name} at {copy.peer.nccl_address}"
        try:
            return self._run(line, copy, lambda: stop.is_set() or self._off.is_set())
        except TimeoutError as error:
            raise DeadlineExceeded(f"no answer from {where}") from error
        except (TransferError, DeadlineExceeded) as error:
            raise type(error)(f"{where}: {error}") from error
        except (OSError, RuntimeError, MigrateError, *UNREADABLE) as error:
            raise TransferError(f"{where}: {error}") from error

    def _run(self, line: Line, copy: Copy, stopped: Stopped) -> int:
        wait_for(lambda: line.lock.acquire(timeout=0.05), copy.end, stopped)
        try:
            link = self._linked(line, copy.end, stopped)
            if not len(copy.local):
                return 0
            patience = Patience(link.sock, copy.end, stopped)
            try:
                while (moved := self._try(link, copy, patience, stopped)) is None:
                    wait_for(lambda: paused(random.uniform(0, _AGAIN_S)), copy.end, stopped)
            except Exception as error:
                line.losses += link.broken and not isinstance(error, TransferCancelled)
                raise
            line.losses = 0
            return moved
        finally:
            line.lock.release()

    def _try(self, link: Link, copy: Copy, patience: Patience, stopped: Stopped) -> int | None:
        """Request once; None when the peer is busy."""
        while not (slots := self._slots.take("receive")):
            wait_for(lambda: paused(_AGAIN_S), copy.end, stopped)
        with self._holding(link, "receive", slots):
            budget = max(1, int((copy.end - time.monotonic()) * 1000))
            say(link.sock, Ask(pack(copy.remote), budget), copy.end)
            answer = hear(link.sock, Answer, MAX_FRAME, copy.end)
            if answer.busy:
                return None
            if answer.error:
                raise TransferError(f"it refused: {answer.error}")
            return link.receive(copy.local, slots, patience, copy.arrived)

    def _linked(self, line: Line, end: float, stopped: Stopped) -> Link:
        """The line's link, made when missing. A transfer that gives up leaves the set-up to the next one."""
        if line.link is not None:
            if not line.link.broken and is_open(line.link.sock):
                return line.link
            self._end(line.link)
            line.link = None
        if line.opening is None:
            line.opening, line.began = Future(), time.monotonic()
            threading.Thread(
                target=self._open, args=(line.peer, line.opening), name="kv-nccl-open", daemon=True
            ).start()
        opening = line.opening
        wait_for(lambda: opening.done() or line.late or not paused(1e-3), end, stopped)
        if not opening.done():
            raise TransferError("its link is still being made")
        line.opening = None
        try:
            line.link = opening.result()
        except Exception:
            line.losses = _LOSSES
            raise
        return line.link

    def _open(self, peer: AgentRecord, opening: Future[Link]) -> None:
        sock = None
        end = time.monotonic() + _SET_UP_S
        try:
            sock = connect(peer.nccl_address, _purpose(peer.epoch), end)
            staging = self._slots.memory()
            say(sock, Hello(self._name, staging.blocks_per_slot), end)
            answer = hear(sock, Answer, MAX_FRAME, end)
            if answer.error:
                raise TransferError(f"it refused: {answer.error}")
            wire = self._connect(sock, 1, staging.device, end)
            link = Link(sock, wire, staging, answer.slot_blocks)
            self._links.add(link)
            opening.set_result(link)
        except Exception as error:
            if sock is not None:
                sock.close()
            opening.set_exception(error)

    @contextmanager
    def _holding(self, link: Link, side: str, slots: Sequence[int]) -> Iterator[None]:
        """Release the slots at the end. An error closes the link first, which may still use them."""
        try:
            yield
        except BaseException:
            if self._end(link):
                self._slots.give(side, slots)
            raise
        self._slots.give(side, slots)

    def _serve(self, connection: socket.socket) -> None:
        end = time.monotonic() + _SET_UP_S
        hello = hear(connection, Hello, MAX_FRAME, end)
        if self._off.is_set():
            say(connection, Answer("its NCCL is off"), end)
            return
        staging = self._slots.memory()
        chunk = min(hello.slot_blocks, staging.blocks_per_slot)
        say(connection, Answer(slot_blocks=chunk), end)
        link = Link(connection, self._connect(connection, 0, staging.device, end), staging, chunk)
        logger.debug("agent %s is linked over NCCL", hello.name)
        self._links.add(link)
        try:
            while not link.broken:
                self._answer(link, hear(connection, Ask, MAX_FRAME, None))
        finally:
            self._end(link)

    def _answer(self, link: Link, ask: Ask) -> None:
        blocks = unpack(ask.blocks)
        said = time.monotonic() + _SAY_S
        if not len(blocks) or int(blocks.max()) >= self._blocks:
            say(link.sock, Answer(f"agent {self._name} has {self._blocks} blocks, and others were named"), said)
            return
        slots = self._slots.take("send")
        if not slots:
            say(link.sock, Answer(busy=True), said)
            return
        patience = Patience(link.sock, time.monotonic() + ask.budget_ms / 1000, self._off.is_set)
        with self._holding(link, "send", slots):
            say(link.sock, Answer(), said)
            link.send(blocks, slots, patience)

    def progress(self) -> list[Generator[bool, None, None]]:
        """Other threads serve. Close links of peers that have gone, to free their memory."""
        now = time.monotonic()
        if now > self._looked + _LOOK_S:
            self._looked = now
            for line in self._lines.values():
                if line.link is not None and line.lock.acquire(blocking=False):
                    if line.link.broken or not is_open(line.link.sock):
                        self._retire(line)
                    line.lock.release()
        return []

    def close(self) -> None:
        """Stop serving, end all communicators."""
        self._off.set()
        self._acceptor.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        # In parallel: each takes half a second. An exit while NCCL ends a communicator would abort the process.
        threads = [threading.Thread(target=self._end, args=(link,), daemon=True) for link in list(self._links)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def _purpose(epoch: str) -> str:
    return f"kv-nccl {epoch}"
