# SPDX-License-Identifier: Apache-2.0
"""Host memory that processes of one host can share: torch storages moved into it.

``move_to_shared_memory`` changes the addresses of the pools: call it before anything has taken them (NumPy views,
registrations). All torch views of a storage follow. The segments have no name once they exist: nothing is left in
/dev/shm, whatever kills the process. No threads, no life cycle of its own: torch frees the memory with the storage.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from components.transfer.config import KVPool

logger = logging.getLogger(__name__)
_SHM = "/dev/shm"
_SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class SharedStorage:
    """A storage in shared memory. torch owns the descriptor."""

    fd: int
    address: int
    size: int


def move_to_shared_memory(pools: Sequence[KVPool]) -> str:
    """Move host pools into shared memory, in place. Gives the reason when that is not possible, and moves nothing."""
    storages = {pool.tensor.untyped_storage().data_ptr(): pool.tensor for pool in pools}
    for tensor in storages.values():
        if tensor.device.type != "cpu" or tensor.is_pinned():
            return f"pools on {tensor.device} or in pinned memory stay where they are"
    everything: list[Any] = [tensor.untyped_storage() for tensor in storages.values()]
    missing = [storage for storage in everything if not storage.is_shared()]
    needed = sum(storage.nbytes() for storage in missing)
    try:
        space = os.statvfs(_SHM)
    except OSError as error:
        return f"{_SHM} cannot be used: {error}"
    free = space.f_bavail * space.f_frsize
    if needed and needed + _SPARE_BYTES > free:
        return f"{_SHM} has {free >> 20} MiB free, the pools take {needed >> 20} (in a container: raise --shm-size)"
    for storage in missing:
        # torch's own switch may be set to named files, which outlive a killed process.
        storage._share_fd_cpu_()
    return ""


def shared_storages(pools: Sequence[KVPool]) -> list[SharedStorage]:
    """The storages of pools that are in shared memory; empty when one of them is not."""
    found: dict[int, SharedStorage] = {}
    for pool in pools:
        storage: Any = pool.tensor.untyped_storage()
        if pool.tensor.device.type != "cpu" or not storage.is_shared():
            return []
        try:
            fd, size = storage._share_fd_cpu_()
        except RuntimeError as error:
            logger.info("pool %s is shared in a way that has no descriptor: %s", pool.name, error)
            return []
        found[storage.data_ptr()] = SharedStorage(fd, storage.data_ptr(), size)
    return list(found.values())


def scope() -> str:
    """Equal for processes that reach each other's sockets and trust each other: network namespace and user."""
    try:
        return f"{os.readlink('/proc/self/ns/net')}/{os.geteuid()}"
    except OSError:
        return ""
