# SPDX-License-Identifier: Apache-2.0
"""The transfer benchmark's reading of the GPU's counters."""

from __future__ import annotations

from benchmarks.transfer.nvlink import counted, nvlink_bytes

REPORT = """GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-0)
\t Link 0: Data Tx: 5082751 KiB
\t Link 0: Data Rx: 43292327 KiB
\t Link 17: Data Tx: 3 KiB
\t Link 17: Data Rx: 0 KiB
"""


def test_counters_of_all_links_are_summed() -> None:
    assert counted(REPORT) == 1024 * (5082751 + 43292327 + 3)


def test_without_links_nothing_is_counted() -> None:
    assert counted("GPU 0: NVIDIA H100 PCIe\n") is None
    assert nvlink_bytes("cpu") is None
