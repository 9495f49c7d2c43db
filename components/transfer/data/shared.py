# SPDX-License-Identifier: Apache-2.0
"""Host memory that processes of one host can share: torch storages made in it.

Within ``SharedZeros`` an engine allocates its pools in shared memory. The segments have no name, so nothing stays in
/dev/shm after any end of the process. No threads, no life cycle of its own: torch frees the memory with the storage.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from components.transfer.config import KVPool

logger = logging.getLogger(__name__)
_LEAST_BYTES = 4096
"""Bytes from which an allocation may be a KV cache."""


@dataclass(frozen=True)
class SharedStorage:
    """A storage in shared memory. torch owns the descriptor."""

    fd: int
    address: int
    size: int


class SharedZeros(TorchFunctionMode):
    """Context in which ``torch.zeros`` on the host allocates shared memory, or ordinary memory where there is none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.zeros or torch.device(kwargs.get("device") or torch.get_default_device()).type != "cpu":
            return func(*args, **kwargs)
        form = func(*args, **{**kwargs, "device": "meta"})
        if form.nbytes < _LEAST_BYTES:
            return func(*args, **kwargs)
        try:
            storage = _new_storage(form.nbytes)
        except (OSError, RuntimeError) as error:
            logger.info("no %d bytes of shared memory: %s", form.nbytes, error)
            return func(*args, **kwargs)
        made = torch.empty(0, dtype=form.dtype).set_(storage, 0, form.shape, form.stride())
        return made.zero_()  # Allocate every page now and not in the first step or migration that touches it.


def _new_storage(size: int) -> torch.UntypedStorage:
    # An anonymous file: /dev/shm does not bound its size, and no name outlives the process.
    fd = os.memfd_create("kv", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        kind: Any = torch.UntypedStorage
        storage: torch.UntypedStorage = kind._new_shared_fd_cpu(fd, size)
        return storage
    finally:
        os.close(fd)


def shared_storages(pools: Sequence[KVPool]) -> list[SharedStorage]:
    """The storages of the pools; empty unless all are in shared memory."""
    everything: dict[int, Any] = {}
    for pool in pools:
        storage = pool.tensor.untyped_storage()
        everything[storage.data_ptr()] = storage
    found: list[SharedStorage] = []
    for address, storage in everything.items():
        if storage.device.type != "cpu" or not storage.is_shared():
            return []
        try:
            fd, size = storage._share_fd_cpu_()
        except RuntimeError as error:
            logger.info("pools are shared in a way that has no descriptor: %s", error)
            return []
        found.append(SharedStorage(fd, address, size))
    return found


def scope() -> str:
    """Network namespace and user: equal for processes that can reach and may trust each other's sockets."""
    try:
        return f"{os.readlink('/proc/self/ns/net')}/{os.geteuid()}"
    except OSError:
        return ""
