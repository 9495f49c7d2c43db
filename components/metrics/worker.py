# SPDX-License-Identifier: Apache-2.0
"""What a worker shows: its engine's last known state. ``stats`` is set on the loop and read by Dynamo's thread."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.registry import Collector

from components.engine.protocol import EngineStats
from components.errors import IncompatibleLayout, IntegrityError, StaleEpoch
from components.metrics import names
from components.metrics.export import Family, family


class WorkerMetrics(Collector):
    """See the module docstring. ``registry`` is what is exported; nothing is shown before the first report."""

    def __init__(self) -> None:
        self.stats: EngineStats | None = None
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def collect(self) -> Iterator[Family]:
        """All of them."""
        stats = self.stats
        if stats is None:
            return
        used = stats.total_blocks - stats.free_blocks
        yield family(names.KV_BLOCKS, {("used",): used, ("free",): stats.free_blocks})
        phases = ("running", "waiting", "frozen", "landing")
        yield family(names.REQUESTS, {(phase,): getattr(stats, phase) for phase in phases})
        yield family(names.STEP, {(): stats.step_s})
        yield family(names.PREEMPTIONS, {(): stats.preemptions_total})
        yield family(names.LEASES, {(): stats.leases_expired_total})
        # Alerts need series from the start, not from the first event on.
        refused = dict.fromkeys((IntegrityError.code, StaleEpoch.code, IncompatibleLayout.code), 0) | stats.kv_refused
        yield family(names.KV_REFUSED, {(code,): count for code, count in refused.items()})
