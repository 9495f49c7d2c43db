# SPDX-License-Identifier: Apache-2.0
"""Bytes over NVLink from the GPU's counters, which prove the lane.

``nvidia-smi`` reads them: NVML's field values damaged the heap of the measured process.
"""

from __future__ import annotations

import re
import subprocess

_COUNTER = re.compile(r"Data [TR]x: (\d+) KiB")


def nvlink_bytes(device: str) -> int | None:
    """Payload bytes that the GPU has sent and received over all its links; None where they are not counted."""
    if not device.startswith("cuda"):
        return None
    return counted(_smi("nvlink", "-gt", "d", "-i", device.partition(":")[2] or "0"))


def counted(report: str) -> int | None:
    """Sum of all links' counters in the report."""
    found = _COUNTER.findall(report)
    return 1024 * sum(map(int, found)) if found else None


def topology() -> str:
    """How the GPUs are linked, as the driver says."""
    return _smi("topo", "-m")


def _smi(*arguments: str) -> str:
    try:
        return subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
