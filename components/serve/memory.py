# SPDX-License-Identifier: Apache-2.0
"""Checks, before the start, that there is memory for a plan's KV blocks, and shared memory.

Whether one worker's blocks hold its longest request vLLM checks itself. Raises ``ConfigError``.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from components.config import ComponentConfig, WorkerConfig
from components.errors import ConfigError

GIB = 1 << 30
SHM = Path("/dev/shm")
_RANKS_GIB = 0.25
"""Queues between the ranks of one engine."""


def check(processes: list[tuple[str, ComponentConfig]]) -> None:
    """Check all. ``processes``: component name and configuration of each possible process on this host."""
    workers = [config for _, config in processes if isinstance(config, WorkerConfig)]
    asked = sum(config.kv_memory_gib for config in workers if not config.devices)
    total = psutil.virtual_memory().total / GIB
    if asked > 0.8 * total:
        raise ConfigError(
            f"the workers ask for {asked:g} GiB of KV memory together, this host has {total:.0f} GiB: "
            "lower kv-memory-gib or replicas"
        )


def shared(processes: list[tuple[str, ComponentConfig]], folder: Path = SHM) -> str:
    """A warning when shared memory is too small, or empty.

    Engines with several ranks exchange each step through it and die when it is full. KV blocks take no room there.
    """
    workers = [config for _, config in processes if isinstance(config, WorkerConfig) and config.engine == "vllm"]
    wanted = sum(_RANKS_GIB for config in workers if max(config.ranks) > 1)
    try:
        space = os.statvfs(folder)
        free = space.f_bavail * space.f_frsize / GIB
    except OSError:
        free = 0.0
    if wanted <= free:
        return ""
    return (
        f"{folder} has {free:.2f} GiB free, engines of several ranks want {wanted:.3g} and may die without it: "
        "docker run --shm-size=2g (Kubernetes: an emptyDir of medium Memory at /dev/shm)"
    )
