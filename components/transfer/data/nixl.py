# SPDX-License-Identifier: Apache-2.0
"""One NIXL agent with its UCX backend: registered memory, posted transfers, notifications.

Threading: all calls on the agent's worker thread; NIXL itself is not locked. Same-host copies happen inside
NIXL's post call, so transfers are posted in pieces and the interpreter lock is released between them.
Errors: ``TransferError``. A failed transfer waits for its pieces in flight until the worker's grace ends; then
``linger`` marks their memory until NIXL has released it.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from components.errors import TransferError, TransferUnavailable
from components.transfer import profiling
from components.transfer.control.record import AgentRecord
from components.transfer.data import ucx
from components.transfer.layout import Ints, Span, pieces

logger = logging.getLogger(__name__)

_WINDOW = 2
"""Pieces in flight at once: one moves while the next is posted."""
_LOOK_S = 5.0
"""Interval between looks at UCX's log."""


@cache
def nixl_is_available() -> tuple[bool, str]:
    """(True, "") or (False, why not). The import is the test: it loads the native library."""
    try:
        import nixl._api  # noqa: F401
    except ImportError as error:
        return False, f"the nixl package cannot be imported: {error}"
    return True, ""


@dataclass
class Moved:
    """Figures of one move, updated while it runs."""

    bytes: int = 0
    descriptors: int = 0
    prep_s: float = 0.0
    post_s: float = 0.0
    wire_s: float = 0.0


@dataclass(frozen=True)
class _Posted:
    handle: Any
    mark: object
    """Range of the profiler."""


class NixlLink:
    """See the module docstring."""

    def __init__(
        self, name: str, memory: Sequence[Span], device: torch.device, piece_bytes: int, own_thread: bool
    ) -> None:
        from nixl._api import nixl_agent, nixl_agent_config

        # NIXL's progress thread spins and takes a whole core for each agent.
        with ucx.log.listening():
            self._agent: Any = nixl_agent(name, nixl_agent_config(enable_prog_thread=own_thread, backends=["UCX"]))
        if "UCX" not in self._agent.backends:
            raise TransferUnavailable("NIXL has no UCX plugin here: reinstall the nixl package")
        self._piece_bytes = piece_bytes
        self._peers: dict[str, str] = {}
        self._looked = 0.0
        self._lingering: list[tuple[_Posted, Callable[[], None]]] = []
        self.memory = "VRAM" if device.type == "cuda" else "DRAM"
        self.device_id = device.index or 0
        # Ranges, not tensors: NIXL accepts only contiguous ones, and an engine's pools are views with any strides.
        ranges = [(span.address, span.size, self.device_id, "") for span in memory]
        try:
            self._registered = self._agent.register_memory(ranges, self.memory)
        except Exception as error:
            raise TransferUnavailable(f"NIXL cannot register the KV pools: {error}") from error

    def blob(self) -> bytes:
        """Metadata for peers."""
        return bytes(self._agent.get_agent_metadata())

    def add(self, peer: AgentRecord) -> str:
        """Load a peer's metadata, once."""
        if peer.key not in self._peers:
            try:
                name = self._agent.add_remote_agent(peer.blob)
            except Exception as error:
                raise TransferError(f"NIXL cannot use the metadata of agent {peer.name}: {error}") from error
            self._peers[peer.key] = name.decode() if isinstance(name, bytes) else name
            self._forget_older(peer)
        return self._peers[peer.key]

    def _forget_older(self, peer: AgentRecord) -> None:
        for key in [k for k in self._peers if k.startswith(f"{peer.name}/") and k != peer.key]:
            self.forget(key)

    def forget(self, key: str) -> None:
        """Drop a peer's metadata; it is loaded again when needed."""
        name = self._peers.pop(key, None)
        if name is not None:
            try:
                self._agent.remove_remote_agent(name)
            except Exception as error:
                logger.debug("removing agent %s: %s", name, error)

    def move(
        self,
        operation: str,
        peer: AgentRecord,
        memory: Ints,
        moved: Moved,
        linger: Callable[[], Callable[[], None]],
        notice: bytes = b"",
    ) -> Generator[bool, None, None]:
        """READ or WRITE the extents (local, remote, bytes). ``notice`` reaches the peer after the last byte."""
        name = self.add(peer)
        groups = pieces(memory, self._piece_bytes)
        flying: deque[_Posted] = deque()
        begun, posted_before = time.perf_counter(), moved.post_s + moved.prep_s
        try:
            for number, group in enumerate(groups):
                last = number == len(groups) - 1
                flying.append(self._post(operation, peer, name, group, moved, notice if last else b""))
                yield True
                yield from self._landed(flying, _WINDOW - 1, peer)
            yield from self._landed(flying, 0, peer)
        except GeneratorExit:
            self._abandon(flying, linger)
            raise
        except BaseException:
            yield from self._stand_still(flying, linger)
            raise
        moved.wire_s += time.perf_counter() - begun - (moved.post_s + moved.prep_s - posted_before)

    def _post(self, operation: str, peer: AgentRecord, name: str, group: Ints, moved: Moved, notice: bytes) -> _Posted:
        start = time.perf_counter()
        region = peer.regions[0]
        remote_memory = "VRAM" if region.device == "cuda" else "DRAM"
        local = np.stack([group[:, 0], group[:, 2], np.full(len(group), self.device_id)], axis=1)
        remote = np.stack([group[:, 1], group[:, 2], np.full(len(group), region.device_id)], axis=1)
        size = int(group[:, 2].sum())
        mark = profiling.begin("wire", size)
        try:
            with profiling.span("post", size):
                handle = self._agent.initialize_xfer(
                    operation,
                    self._agent.get_xfer_descs(local.astype(np.uint64), self.memory),
                    self._agent.get_xfer_descs(remote.astype(np.uint64), remote_memory),
                    name,
                    notice,
                )
                ready = time.perf_counter()
                state = self._agent.transfer(handle, notice)
        except Exception as error:
            profiling.end(mark)
            self.forget(peer.key)
            raise TransferError(f"NIXL refused a transfer with {peer.name}: {error}") from error
        moved.prep_s += ready - start
        moved.post_s += time.perf_counter() - ready
        moved.bytes += size
        moved.descriptors += len(group)
        posted = _Posted(handle, mark)
        if state == "ERR":
            self._release(posted)
            self.forget(peer.key)
            raise TransferError(f"NIXL could not post a transfer with {peer.name}")
        return posted

    def _landed(self, flying: deque[_Posted], most: int, peer: AgentRecord) -> Generator[bool, None, None]:
        """Wait until ``most`` are left in flight, the oldest first."""
        while len(flying) > most:
            try:
                state = self._agent.check_xfer_state(flying[0].handle)
            except Exception as error:
                state = f"{type(error).__name__}: {error}"
            if state == "PROC":
                yield False
                continue
            done = flying.popleft()
            self._release(done)
            if state != "DONE":
                self.forget(peer.key)
                raise TransferError(f"the connection with {peer.name} broke: {state}")

    def _stand_still(
        self, flying: deque[_Posted], linger: Callable[[], Callable[[], None]]
    ) -> Generator[bool, None, None]:
        # Cancelling a remote copy does not stop the peer: local memory is quiet only after its end.
        try:
            while flying:
                if self._in_progress(flying[0].handle):
                    yield False
                else:
                    self._release(flying.popleft())
        finally:
            self._abandon(flying, linger)

    def _abandon(self, flying: deque[_Posted], linger: Callable[[], Callable[[], None]]) -> None:
        if flying:
            settled = linger()
            self._lingering.extend((posted, settled) for posted in flying)
            flying.clear()

    def _in_progress(self, handle: Any) -> bool:
        try:
            return bool(self._agent.check_xfer_state(handle) == "PROC")
        except Exception:
            return False

    def _release(self, posted: _Posted) -> None:
        profiling.end(posted.mark)
        try:
            self._agent.release_xfer_handle(posted.handle)
        except Exception as error:
            logger.debug("releasing a NIXL transfer: %s", error)

    def notify(self, peer: AgentRecord, message: bytes) -> None:
        """Send a message. Raises ``TransferError`` when the peer cannot be reached."""
        try:
            self._agent.send_notif(self.add(peer), message)
        except TransferError:
            raise
        except Exception as error:
            self.forget(peer.key)
            raise TransferError(f"agent {peer.name} cannot be reached: {error}") from error

    def poll(self) -> dict[str, list[bytes]]:
        """Serve peers that connect or read. Returns new messages by sender."""
        for item in list(self._lingering):
            if not self._in_progress(item[0].handle):
                self._release(item[0])
                self._lingering.remove(item)
                item[1]()
        now = time.monotonic()
        if now - self._looked > _LOOK_S:
            self._looked = now
            ucx.log.drain()
        found: dict[str, list[bytes]] = self._agent.get_new_notifs()
        return found

    def close(self) -> None:
        """Deregister the pools."""
        for key in list(self._peers):
            self.forget(key)
        self._agent.deregister_memory(self._registered)
        self._agent = None
