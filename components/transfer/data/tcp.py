# SPDX-License-Identifier: Apache-2.0
"""Blocks over plain TCP, for hosts without NIXL.

Wire format: one msgpack ``_Ask`` behind a 4-byte length, then the asked extents' bytes, in order. The server
only reads memory of registered pools: block numbers are checked, addresses never come from the wire.
Threading: a daemon thread accepts, one more serves each connection; ``read`` runs on the posting thread.
Host memory only: tensors on devices are staged by ``tensor.cpu()`` block by block.
"""

from __future__ import annotations

import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Annotated

import msgspec
import torch

from components.errors import DeadlineExceeded, TransferCancelled, TransferError
from components.transfer.config import KVPool, TransferResult
from components.transfer.control.record import AgentRecord

logger = logging.getLogger(__name__)
_MAX_ASK = 8 << 20
_LENGTH = struct.Struct("!I")
_REFUSED = b"\x00"
_GRANTED = b"\x01"


class _Ask(msgspec.Struct, frozen=True):
    epoch: Annotated[str, msgspec.Meta(max_length=128)]
    pool: Annotated[int, msgspec.Meta(ge=0)]
    blocks: Annotated[tuple[Annotated[int, msgspec.Meta(ge=0)], ...], msgspec.Meta(max_length=1 << 20)]


_decoder = msgspec.msgpack.Decoder(_Ask)


class TcpBackend:
    """Serves our blocks and reads those of others."""

    def __init__(self, epoch: str, pools: Sequence[KVPool], advertise_host: str) -> None:
        self._epoch = epoch
        self._pools = list(pools)
        self._server = socket.create_server((advertise_host, 0))
        self._address = f"{advertise_host}:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, name="kv-tcp", daemon=True).start()

    @property
    def lane(self) -> str:
        """Always ``tcp``."""
        return "tcp"

    def describe(self) -> tuple[bytes, str]:
        """Our address."""
        return b"", self._address

    def reaches(self, peer: AgentRecord) -> bool:
        """True when the peer serves this lane."""
        return bool(peer.tcp_address)

    def read(
        self,
        peer: AgentRecord,
        src_blocks: Sequence[int],
        dst_blocks: Sequence[int],
        timeout_s: float,
        cancelled: Callable[[], bool],
    ) -> TransferResult:
        """See ``Backend``."""
        started = time.perf_counter()
        end = time.monotonic() + timeout_s
        total = 0
        host, _, port = peer.tcp_address.rpartition(":")
        try:
            with socket.create_connection((host, int(port)), timeout=timeout_s) as sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for number, pool in enumerate(self._pools):
                    if cancelled():
                        raise TransferCancelled(f"the transfer from {peer.name} was cancelled")
                    ask = msgspec.msgpack.encode(_Ask(peer.epoch, number, tuple(src_blocks)))
                    sock.settimeout(max(0.001, end - time.monotonic()))
                    sock.sendall(_LENGTH.pack(len(ask)) + ask)
                    if _receive(sock, 1, end) != _GRANTED:
                        raise TransferError(f"agent {peer.name} refused: other epoch or unknown blocks")
                    total += self._store(pool, dst_blocks, sock, end)
        except TimeoutError as error:
            raise DeadlineExceeded(f"no answer from agent {peer.name} at {peer.tcp_address}") from error
        except OSError as error:
            raise TransferError(f"agent {peer.name} at {peer.tcp_address}: {error}") from error
        wire = time.perf_counter() - started
        return TransferResult(total, len(self._pools), wire_s=wire, lane=self.lane)

    def _store(self, pool: KVPool, blocks: Sequence[int], sock: socket.socket, end: float) -> int:
        shape = [len(blocks), *(n for axis, n in enumerate(pool.tensor.shape) if axis != pool.block_dim)]
        flat = torch.empty(shape, dtype=pool.tensor.dtype).view(torch.uint8)
        view = memoryview(flat.reshape(-1).numpy())
        _receive_into(sock, view, end)
        rows = flat.view(pool.tensor.dtype).to(pool.tensor.device).movedim(0, pool.block_dim)
        pool.tensor.index_copy_(
            pool.block_dim, torch.tensor(list(blocks), dtype=torch.int64, device=pool.tensor.device), rows
        )
        return len(view)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), name="kv-tcp-peer", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(60.0)
            try:
                while head := connection.recv(_LENGTH.size, socket.MSG_WAITALL):
                    (length,) = _LENGTH.unpack(head)
                    if length > _MAX_ASK:
                        return
                    ask = _decoder.decode(_receive(connection, length, time.monotonic() + 60.0))
                    self._answer(connection, ask)
            except (OSError, struct.error, msgspec.DecodeError, TransferError) as error:
                logger.warning("closing a KV connection: %s", error)

    def _answer(self, connection: socket.socket, ask: _Ask) -> None:
        known = ask.epoch == self._epoch and ask.pool < len(self._pools)
        if not known or any(block >= self._pools[ask.pool].num_blocks for block in ask.blocks):
            connection.sendall(_REFUSED)
            return
        pool = self._pools[ask.pool]
        index = torch.tensor(list(ask.blocks), dtype=torch.int64, device=pool.tensor.device)
        rows = pool.tensor.index_select(pool.block_dim, index).movedim(pool.block_dim, 0).contiguous().cpu()
        connection.sendall(_GRANTED)
        connection.sendall(memoryview(rows.view(torch.uint8).reshape(-1).numpy()))

    def progress(self) -> None:
        """Nothing to do: threads of our own serve."""

    def close(self) -> None:
        """Stop serving."""
        self._server.close()


def _receive(sock: socket.socket, count: int, end: float) -> bytes:
    data = bytearray(count)
    _receive_into(sock, memoryview(data), end)
    return bytes(data)


def _receive_into(sock: socket.socket, view: memoryview, end: float) -> None:
    done = 0
    while done < len(view):
        sock.settimeout(max(0.001, end - time.monotonic()))
        got = sock.recv_into(view[done:])
        if not got:
            raise TransferError("the connection was closed in the middle of a block")
        done += got
