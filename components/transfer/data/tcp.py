# SPDX-License-Identifier: Apache-2.0
"""Blocks over plain TCP, for hosts without NIXL.

Wire format: the handshake (``components.handshake``), an ``_Ask``, an ``_Answer``, then rows of the requested blocks,
segment by segment. An agent that takes only some heads names itself: its record tells which. Nobody can write to a
server: each side fills only its own blocks, for its own transfers. The server touches only registered pools: it checks
block numbers, and no address comes from the wire.
Threading: one thread serves each connection, one runs each transfer; the socket has the transfer's deadline. Rows are
received into a buffer and copied to blocks when they are complete.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import msgspec
import torch

from components.acceptor import Acceptor
from components.address import Address, bare, listen
from components.errors import DeadlineExceeded, MigrateError, TransferCancelled, TransferError
from components.frames import hear, left, read_into, say
from components.handshake import connect
from components.transfer.config import TransferResult
from components.transfer.control.directory import Directory
from components.transfer.control.record import AgentRecord
from components.transfer.data.base import Backend, Copy, Steps
from components.transfer.layout import Ints, rows_of
from components.transfer.session.messages import MAX_BLOCKS, pack, unpack
from components.transfer.shares import Shares

_MAX_ASK = 4 * MAX_BLOCKS + 1024
_SERVE_S = 60.0
_KNOWN_S = 5.0
"""Wait for the record of a peer that has asked."""
_LOOK_S = 0.01
_CHUNK_BYTES = 8 << 20


class _Ask(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    blocks: Annotated[bytes, msgspec.Meta(max_length=4 * MAX_BLOCKS)]
    taker: Annotated[str, msgspec.Meta(max_length=512)] = ""
    """Name and epoch of an agent that does not take whole blocks."""


class _Answer(msgspec.Struct, frozen=True):
    granted: bool


_MAX_ANSWER = 64


def _purpose(epoch: str) -> str:
    return f"kv-tcp {epoch}"


class TcpBackend(Backend):
    """Serves local blocks and fetches remote ones."""

    lane = "tcp/sockets"

    def __init__(self, name: str, epoch: str, shares: Shares, host: str, directory: Directory) -> None:
        self._key = f"{name}/{epoch}"
        self._shares = shares
        self._rows = rows_of(shares.regions)
        self._directory = directory
        server = listen(host)
        self.address = str(Address(bare(host), server.getsockname()[1]))
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="kv-tcp-out")
        self._acceptor = Acceptor(server, _purpose(epoch), self._serve, "kv-tcp")

    def reaches(self, peer: AgentRecord) -> bool:
        """True when the peer serves this lane."""
        return bool(peer.tcp_address)

    def fetch(self, copy: Copy) -> Steps:
        """See ``Backend``."""
        begun = time.perf_counter()
        stop = threading.Event()
        future = self._pool.submit(self._guarded, copy, stop)
        try:
            while not future.done():
                yield False
        except MigrateError:
            stop.set()
            while not future.done():
                yield False
            raise
        finally:
            if not future.done():
                # The thread may still write.
                settled = copy.mark_unsafe()
                future.add_done_callback(lambda _: settled())
        wire = time.perf_counter() - begun
        return TransferResult(future.result(), len(copy.share.rows), wire_s=wire, lane=self.lane)

    def _guarded(self, copy: Copy, stop: threading.Event) -> int:
        where = f"agent {copy.peer.name} at {copy.peer.tcp_address}"
        try:
            with self._connect(copy) as sock:
                return self._receive_rows(sock, copy, stop)
        except TimeoutError as error:
            raise DeadlineExceeded(f"no answer from {where}") from error
        except TransferError:
            raise
        except (OSError, ValueError, MigrateError) as error:
            raise TransferError(f"{where}: {error}") from error

    def _connect(self, copy: Copy) -> socket.socket:
        sock = connect(copy.peer.tcp_address, _purpose(copy.peer.epoch), copy.end)
        try:
            say(sock, _Ask(pack(copy.remote), "" if copy.share.whole else self._key), copy.end)
            if not hear(sock, _Answer, _MAX_ANSWER, copy.end).granted:
                raise TransferError("it refused: it has not all of these blocks")
        except BaseException:
            sock.close()
            raise
        return sock

    def _receive_rows(self, sock: socket.socket, copy: Copy, stop: threading.Event) -> int:
        total = 0
        for row in copy.share.rows:
            for part in _parts(copy.local, row):
                buffer = torch.empty((len(part), row.shape[-1]), dtype=torch.uint8)
                read_into(sock, _bytes_of(buffer), copy.end)
                if stop.is_set():
                    raise TransferCancelled("the transfer was stopped")
                row.index_copy_(0, part.to(row.device), buffer.to(row.device))
                total += buffer.numel()
        return total

    def _send_rows(self, sock: socket.socket, rows: Sequence[torch.Tensor], blocks: Ints, end: float) -> None:
        for row in rows:
            for part in _parts(blocks, row):
                data = row.index_select(0, part.to(row.device)).cpu()
                sock.settimeout(left(end))
                sock.sendall(_bytes_of(data))

    def _serve(self, connection: socket.socket) -> None:
        end = time.monotonic() + _SERVE_S
        ask = hear(connection, _Ask, _MAX_ASK, end)
        blocks = unpack(ask.blocks)
        granted = self._have(blocks)
        rows = self._rows_for(ask.taker) if granted else ()
        say(connection, _Answer(granted), end)
        if granted:
            self._send_rows(connection, rows, blocks, end)

    def _rows_for(self, taker: str) -> Sequence[torch.Tensor]:
        """What an agent takes. Its record may arrive after its request."""
        if not taker:
            return self._rows
        name, _, epoch = taker.rpartition("/")
        end = time.monotonic() + _KNOWN_S
        while (peer := self._directory.get(name)) is None or peer.epoch != epoch:
            if time.monotonic() > end:
                raise TransferError(f"agent {name} has asked for some heads and has published no record")
            time.sleep(_LOOK_S)
        return self._shares.given(peer).rows

    def _have(self, blocks: Ints) -> bool:
        return not len(blocks) or int(blocks.max()) < self._rows[0].shape[0]

    def close(self) -> None:
        """Stop serving."""
        self._acceptor.close()
        self._pool.shutdown(wait=False, cancel_futures=True)


def _parts(blocks: Ints, row: torch.Tensor) -> list[torch.Tensor]:
    """Block ids in groups of bounded bytes."""
    step = max(1, _CHUNK_BYTES // row.shape[-1])
    return [torch.from_numpy(blocks[start : start + step]) for start in range(0, len(blocks), step)]


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    flat: Any = tensor.reshape(-1).numpy()
    return memoryview(flat)
