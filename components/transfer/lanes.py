# SPDX-License-Identifier: Apache-2.0
"""The transports that ``--nixl-transport`` names, and the UCX variables that each one means.

UCX reads its variables once, when the first agent of a process starts: ``environment`` must be applied
before. A variable that the user has set is never overridden.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from components.errors import TransferUnavailable
from components.transfer.config import Transport

_TLS: dict[Transport, str | None] = {
    Transport.AUTO: None,
    Transport.IB: "rc,dc,cuda_copy",
    Transport.NVLINK: "cuda_ipc,cuda_copy,sm,self,tcp",
    Transport.TCP: "tcp,cuda_copy,self",
    # UCX makes no endpoint without a transport that detects a dead peer: tcp detects, sm moves the bytes.
    Transport.SHM: "sm,cuda_copy,self,tcp",
}
RDMA_DEVICES = Path("/sys/class/infiniband")
NVIDIA_DEVICES = Path("/proc/driver/nvidia/gpus")
NVIDIA_CONTROL = Path("/dev/nvidiactl")


def check(transport: Transport) -> None:
    """Raise ``TransferUnavailable`` naming what this host lacks for the transport."""
    if transport is Transport.IB and not (RDMA_DEVICES.is_dir() and any(RDMA_DEVICES.iterdir())):
        raise TransferUnavailable(
            f"--nixl-transport ib needs an RDMA device, and {RDMA_DEVICES} lists none: "
            "load the driver (in a container: pass the device and IPC_LOCK), or use auto or tcp"
        )
    if transport is Transport.NVLINK and not (NVIDIA_DEVICES.is_dir() and any(NVIDIA_DEVICES.iterdir())):
        raise TransferUnavailable(
            f"--nixl-transport nvlink needs NVIDIA GPUs, and {NVIDIA_DEVICES} lists none: use auto, shm or tcp"
        )


def environment(transport: Transport, current: Mapping[str, str]) -> dict[str, str]:
    """Variables to add to ``current`` for this transport."""
    tls = _TLS[transport]
    if tls is None or "UCX_TLS" in current:
        return {}
    if not NVIDIA_DEVICES.is_dir() and not NVIDIA_CONTROL.exists():
        # Without a GPU UCX would log a warning at every start.
        tls = ",".join(name for name in tls.split(",") if name != "cuda_copy")
    return {"UCX_TLS": tls}
