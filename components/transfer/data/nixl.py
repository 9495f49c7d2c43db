# SPDX-License-Identifier: Apache-2.0
"""Blocks over NIXL with its UCX backend.

Threading: ``read`` runs on the agent's posting thread. Same-host copies happen inside NIXL's post call,
so large transfers are posted in pieces: the thread gives the interpreter back between them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

from components.errors import DeadlineExceeded, TransferCancelled, TransferError
from components.transfer.config import Region, TransferResult
from components.transfer.control.record import AgentRecord
from components.transfer.data.base import extents, runs

logger = logging.getLogger(__name__)


@cache
def nixl_is_available() -> tuple[bool, str]:
    """(True, "") or (False, why not). Importing is the test: it loads the native library."""
    try:
        import nixl._api  # noqa: F401
    except ImportError as error:
        return False, f"the nixl package cannot be imported: {error}"
    return True, ""


class NixlBackend:
    """One NIXL agent with all pools registered."""

    def __init__(self, name: str, regions: Sequence[Region], piece_bytes: int, lane: str, own_thread: bool) -> None:
        from nixl._api import nixl_agent, nixl_agent_config

        # NIXL's progress thread spins: a whole core for each agent, which a small host does not have.
        self._agent: Any = nixl_agent(name, nixl_agent_config(enable_prog_thread=own_thread, backends=["UCX"]))
        self._regions = list(regions)
        self._piece_bytes = piece_bytes
        self._lane = lane
        self._peers: dict[tuple[str, str], str] = {}
        tensors = [region.tensor for region in regions]
        self._on_device = bool(tensors) and tensors[0].is_cuda
        self._device_id = tensors[0].device.index or 0 if self._on_device else 0
        self._memory = "VRAM" if self._on_device else "DRAM"
        self._registered = self._agent.register_memory(tensors)

    @property
    def lane(self) -> str:
        """``nixl/ucx`` and the transport that was asked for."""
        return self._lane

    def describe(self) -> tuple[bytes, str]:
        """Our NIXL blob."""
        return bytes(self._agent.get_agent_metadata()), ""

    def reaches(self, peer: AgentRecord) -> bool:
        """True when the peer has NIXL as well."""
        return bool(peer.blob)

    def read(
        self,
        peer: AgentRecord,
        src_blocks: Sequence[int],
        dst_blocks: Sequence[int],
        timeout_s: float,
        cancelled: Callable[[], bool],
    ) -> TransferResult:
        """See ``Backend``."""
        end = time.monotonic() + timeout_s
        started = time.perf_counter()
        remote_name = self._add(peer)
        remote_memory = "VRAM" if peer.regions[0].device == "cuda" else "DRAM"
        remote_id = peer.regions[0].device_id
        memory = extents(self._regions, peer, runs(src_blocks, dst_blocks))
        prep = time.perf_counter() - started
        post = wire = 0.0
        for piece in _pieces(memory, self._piece_bytes):
            if cancelled():
                raise TransferCancelled(f"the transfer from {peer.name} was cancelled")
            began = time.perf_counter()
            local = self._agent.get_xfer_descs([(at, n, self._device_id) for _, at, n in piece], self._memory)
            remote = self._agent.get_xfer_descs([(r, n, remote_id) for r, _, n in piece], remote_memory)
            try:
                handle = self._agent.initialize_xfer("READ", local, remote, remote_name, b"")
            except Exception as error:
                self._forget(peer)
                raise TransferError(f"NIXL refused a transfer from {peer.name}: {error}") from error
            ready = time.perf_counter()
            prep += ready - began
            try:
                state = self._agent.transfer(handle)
                posted = time.perf_counter()
                state = self._wait(handle, state, end, peer)
            except DeadlineExceeded:
                raise
            except Exception as error:
                self._forget(peer)
                raise TransferError(f"NIXL lost the transfer from {peer.name}: {error}") from error
            finally:
                # Releasing aborts what is still under way, so that nothing lands in our blocks later.
                self._agent.release_xfer_handle(handle)
            if state != "DONE":
                self._forget(peer)
                raise TransferError(f"NIXL ended the transfer from {peer.name} in state {state}")
            post += posted - ready
            wire += time.perf_counter() - posted
        total = sum(length for _, _, length in memory)
        return TransferResult(total, len(memory), prep, post, wire, self._lane)

    def _wait(self, handle: Any, state: str, end: float, peer: AgentRecord) -> str:
        pause = 20e-6
        while state == "PROC":
            if time.monotonic() > end:
                self._forget(peer)
                raise DeadlineExceeded(f"no answer from agent {peer.name} within the deadline")
            time.sleep(pause)
            pause = min(pause * 1.5, 1e-3)
            state = self._agent.check_xfer_state(handle)
        return state

    def _add(self, peer: AgentRecord) -> str:
        key = (peer.name, peer.epoch)
        if key not in self._peers:
            try:
                name = self._agent.add_remote_agent(peer.blob)
            except Exception as error:
                raise TransferError(f"NIXL cannot use the metadata of agent {peer.name}: {error}") from error
            self._peers[key] = name.decode() if isinstance(name, bytes) else name
        return self._peers[key]

    def _forget(self, peer: AgentRecord) -> None:
        name = self._peers.pop((peer.name, peer.epoch), None)
        if name is not None:
            try:
                self._agent.remove_remote_agent(name)
            except Exception as error:
                logger.debug("removing agent %s: %s", name, error)

    def progress(self) -> None:
        """Answer peers that are connecting or reading."""
        self._agent.get_new_notifs()

    def close(self) -> None:
        """Deregister the pools."""
        self._agent.deregister_memory(self._registered)
        self._agent = None


def _pieces(memory: list[tuple[int, int, int]], limit: int) -> Iterator[list[tuple[int, int, int]]]:
    """Groups of at most ``limit`` bytes; longer extents are cut."""
    piece: list[tuple[int, int, int]] = []
    size = 0
    for remote, local, length in memory:
        while length:
            take = min(length, limit - size)
            piece.append((remote, local, take))
            remote, local, length, size = remote + take, local + take, length - take, size + take
            if size == limit:
                yield piece
                piece, size = [], 0
    if piece:
        yield piece
