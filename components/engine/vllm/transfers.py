# SPDX-License-Identifier: Apache-2.0
"""Copies of prompts from prefill engines, in the metrics of vLLM's ``NixlConnector``.

Dashboards and alerts on ``vllm:nixl_xfer_time_seconds``, ``vllm:nixl_bytes_transferred`` and the like, and vLLM's log
line "KV Transfer metrics", stay as they are. Copies of migrations are not in them: they have metrics of their own.

Threading: the engine core's thread.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats

from components.engine.vllm.records import JobResult


class Transfers:
    """Counted since the last ``take``."""

    def __init__(self) -> None:
        self._stats: NixlKVConnectorStats | None = None

    def note(self, results: Iterable[JobResult]) -> None:
        """A prompt's copy has ended: one result for each rank, as vLLM counts."""
        for result in results:
            if not result.ok:
                self._data["num_failed_transfers"].append(1)
            elif result.bytes:
                # NIXL's duration of a transfer begins before it is posted (``nixlXferTelemetry``).
                self._data["transfer_duration"].append(result.post_s + result.wire_s)
                self._data["post_duration"].append(result.post_s)
                self._data["bytes_transferred"].append(result.bytes)
                self._data["num_descriptors"].append(result.descriptors)

    def expired(self) -> None:
        """No decode worker has asked for lent blocks in time."""
        self._data["num_kv_expired_reqs"].append(1)

    @property
    def _data(self) -> dict[str, list[Any]]:
        if self._stats is None:
            self._stats = NixlKVConnectorStats()
        return self._stats.data

    def take(self) -> NixlKVConnectorStats | None:
        """What vLLM puts beside its own statistics of a step; None for nothing."""
        stats, self._stats = self._stats, None
        return stats
