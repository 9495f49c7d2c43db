# SPDX-License-Identifier: Apache-2.0
"""``transfer_kv_cache``: blocks of one process's cache to another device, asynchronously.

Between CUDA devices and hosts the copies are queued on ``stream`` and an event marks their end; between host
tensors they run on a thread. The blocks must not be written before the handle is done.
Errors come through the handle (``TransferError``); bad arguments raise ``ConfigError`` at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from components.errors import ConfigError, TransferError
from components.transfer.config import TransferResult
from components.transfer.handle import TransferHandle


@dataclass(frozen=True)
class CacheCopy:
    """Copies in flight. ``blocks`` may be read once ``handle`` is done."""

    blocks: tuple[torch.Tensor, ...]
    handle: TransferHandle


def transfer_kv_cache(
    src_device: torch.device | str,
    dst_device: torch.device | str,
    cache_blocks: Sequence[torch.Tensor],
    stream: torch.cuda.Stream | None = None,
    on_done: Callable[[TransferHandle], None] | None = None,
) -> CacheCopy:
    """Copy blocks from one device to another: gathered into one piece, moved once."""
    source, target = torch.device(src_device), torch.device(dst_device)
    if any(block.device.type != source.type for block in cache_blocks):
        raise ConfigError(f"not all blocks are on {source}")
    if len({(block.shape, block.dtype) for block in cache_blocks}) > 1:
        raise ConfigError("all blocks of one call must have one shape and dtype")
    handle = TransferHandle()
    if on_done is not None:
        handle.add_done_callback(on_done)
    if not cache_blocks:
        handle.settle(TransferResult(), None)
        return CacheCopy((), handle)
    shape = (len(cache_blocks), *cache_blocks[0].shape)
    arrived = torch.empty(shape, dtype=cache_blocks[0].dtype, device=target)
    on_device = "cuda" in (source.type, target.type)
    event = _queue(cache_blocks, arrived, source, target, stream) if on_device else None
    work = threading.Thread(target=_finish, args=(cache_blocks, arrived, event, handle), name="kv-copy", daemon=True)
    work.start()
    return CacheCopy(tuple(arrived.unbind(0)), handle)


def _queue(
    blocks: Sequence[torch.Tensor],
    arrived: torch.Tensor,
    source: torch.device,
    target: torch.device,
    stream: torch.cuda.Stream | None,
) -> torch.cuda.Event:
    queue = stream or torch.cuda.current_stream(source if source.type == "cuda" else target)
    with torch.cuda.stream(queue):
        arrived.copy_(torch.stack(list(blocks)), non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(queue)
    arrived.record_stream(queue) if arrived.is_cuda else None
    return event


def _finish(
    blocks: Sequence[torch.Tensor], arrived: torch.Tensor, event: torch.cuda.Event | None, handle: TransferHandle
) -> None:
    start = time.perf_counter()
    try:
        if event is None:
            torch.stack(list(blocks), out=arrived)
        else:
            event.synchronize()
    except RuntimeError as error:
        handle.settle(None, TransferError(str(error)))
        return
    size = arrived.numel() * arrived.element_size()
    lane = f"memcpy/{blocks[0].device.type}-{arrived.device.type}"
    handle.settle(TransferResult(size, 1, wire_s=time.perf_counter() - start, lane=lane), None)
