# SPDX-License-Identifier: Apache-2.0
"""Facts of this host and installation. ``gather`` reads them and never raises; unreadable ones are empty."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import resource
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from components.serve import precision
from components.transfer import lanes

PACKAGE = "dynamo-migrate"
_PTRACE = Path("/proc/sys/kernel/yama/ptrace_scope")
_SHM = Path("/dev/shm")


@dataclass(frozen=True)
class Host:
    """The input of ``judge``."""

    python: tuple[int, int] = (0, 0)
    requires: tuple[str, ...] = ()
    """Requirements of this package, from its metadata."""
    packages: dict[str, str] = field(default_factory=dict)
    """Installed versions by lower-case name."""
    nixl_error: str = ""
    nixl_plugins: tuple[str, ...] = ()
    gpus: tuple[str, ...] = ()
    rdma: dict[str, str] = field(default_factory=dict)
    """Device to the state of its first port."""
    memlock: int | None = None
    """Bytes; None: unlimited."""
    open_files: int | None = None
    shm_bytes: int = 0
    ptrace_scope: int = 0
    fast_bfloat16: bool = True


def gather() -> Host:
    """Read the facts. Takes 1 to 2 s, because it loads NIXL's native library."""
    error, plugins = _nixl()
    return Host(
        python=sys.version_info[:2],
        requires=_requires(),
        packages=_packages(),
        nixl_error=error,
        nixl_plugins=plugins,
        gpus=gpus(),
        rdma=_rdma(),
        memlock=_limit(resource.RLIMIT_MEMLOCK),
        open_files=_limit(resource.RLIMIT_NOFILE),
        shm_bytes=shutil.disk_usage(_SHM).free if _SHM.is_dir() else 0,
        ptrace_scope=int(_read(_PTRACE) or 0),
        fast_bfloat16=precision.fast_bfloat16(),
    )


def _requires() -> tuple[str, ...]:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return tuple(importlib.metadata.requires(PACKAGE) or ())
    return ()


def _packages() -> dict[str, str]:
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(name.lower().replace("_", "-"), distribution.version)
    return found


def _nixl() -> tuple[str, tuple[str, ...]]:
    from components.transfer import nixl_is_available

    # Its loggers write to standard output, which ``-o json`` needs.
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
    available, why = nixl_is_available()
    if not available:
        return why, ()
    from nixl._api import nixl_agent, nixl_agent_config

    try:
        agent = nixl_agent("doctor", nixl_agent_config(backends=[]))
        return "", tuple(sorted(agent.get_plugin_list()))
    except Exception as error:
        # The user must read whatever the native library raises.
        return f"{type(error).__name__}: {error}", ()


def gpus() -> tuple[str, ...]:
    """Names of NVIDIA's GPUs, as the driver lists them."""
    if not lanes.NVIDIA_DEVICES.is_dir():
        return ()
    names = []
    for folder in sorted(lanes.NVIDIA_DEVICES.iterdir()):
        model = [line for line in _read(folder / "information").splitlines() if line.startswith("Model:")]
        names.append(model[0].partition(":")[2].strip() if model else folder.name)
    return tuple(names)


def _rdma() -> dict[str, str]:
    if not lanes.RDMA_DEVICES.is_dir():
        return {}
    # The file says "4: ACTIVE".
    return {
        device.name: (_read(device / "ports" / "1" / "state") or "unknown").rpartition(":")[2].strip()
        for device in sorted(lanes.RDMA_DEVICES.iterdir())
    }


def _limit(which: int) -> int | None:
    soft, _ = resource.getrlimit(which)
    return None if soft == resource.RLIM_INFINITY else soft


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
