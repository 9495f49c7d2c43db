# SPDX-License-Identifier: Apache-2.0
"""The baselines that torch.distributed gives: send and receive, and all-gather, of one contiguous tensor.

Rank 0 is the destination and takes the times; rank 1 does what ``Task`` says.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed

from components.serve.servers import free_port

_TIMEOUT = timedelta(seconds=60)


@dataclass(frozen=True)
class Task:
    """What both ranks do."""

    library: str
    """nccl or gloo"""
    operation: str
    """send/recv or all-gather"""
    size: int
    count: int
    url: str


def task(library: str, operation: str, size: int, count: int) -> Task:
    """A task with a free port to meet at."""
    return Task(library, operation, size, count, f"tcp://127.0.0.1:{free_port()}")


def times(what: Task, device: str) -> list[float]:
    """Seconds of each repetition, at the destination."""
    return _run(what, device, 0)


def serve(what: Task, device: str) -> None:
    """Take part as the source."""
    _run(what, device, 1)


def _run(what: Task, device: str, rank: int) -> list[float]:
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(device)
    distributed.init_process_group(
        what.library,
        init_method=what.url,
        rank=rank,
        world_size=2,
        timeout=_TIMEOUT,
        # Without it NCCL guesses the GPU from the rank, and hangs when that is another one.
        device_id=torch.device(device) if on_gpu else None,
    )
    ready = torch.zeros(1, device=device)
    data = torch.full((what.size,), rank, dtype=torch.uint8, device=device)
    parts = [torch.empty_like(data) for _ in range(2)] if what.operation == "all-gather" else []
    seconds = []
    for _ in range(what.count):
        distributed.all_reduce(ready)
        _wait(device)
        began = time.perf_counter()
        if parts:
            distributed.all_gather(parts, data)
        elif rank:
            distributed.send(data, 0)
        else:
            distributed.recv(data, 1)
        _wait(device)
        seconds.append(time.perf_counter() - began)
    arrived = parts[1] if parts else data
    right = bool((arrived == 1).all())
    distributed.destroy_process_group()
    if not right:
        raise RuntimeError(f"{what.library} {what.operation}: other bytes arrived")
    return seconds


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
