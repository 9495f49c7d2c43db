# SPDX-License-Identifier: Apache-2.0
"""What went over NVLink, by the GPU's own counters: the lane that was really used, whatever was asked for."""

from __future__ import annotations

import subprocess


def nvlink_bytes(device: str) -> int | None:
    """Payload bytes that the GPU has sent and received over all its links; None where they are not counted."""
    if not device.startswith("cuda"):
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(int(device.partition(":")[2] or 0))
        fields = (pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX)
        wanted = [(field, link) for field in fields for link in range(pynvml.NVML_NVLINK_MAX_LINKS)]
        values = pynvml.nvmlDeviceGetFieldValues(handle, wanted)
    except pynvml.NVMLError:
        return None
    known = [value.value.ullVal for value in values if value.nvmlReturn == 0]
    return 1024 * sum(known) if known else None


def topology() -> str:
    """How the GPUs are linked, as the driver says."""
    try:
        return subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
