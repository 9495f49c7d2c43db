# SPDX-License-Identifier: Apache-2.0
"""Dynamo's forward-pass metrics for policies: the age of a worker's last metrics, and queued KV.

Keys are ``<worker id>/<rank>``; the worker id is Dynamo's instance id in decimal. Workers' names are its last eight
hexadecimal digits. An unreadable payload counts as not received.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)


def decoded(engines: Mapping[str, bytes]) -> dict[str, list[Any]]:
    """Metrics of all ranks by worker, by name."""
    from dynamo.common.forward_pass_metrics import decode

    found: dict[str, list[Any]] = {}
    for key, payload in engines.items():
        worker = key.partition("/")[0]
        metrics = decode(payload)
        if metrics is None or not worker.isdecimal():
            logger.debug("metrics of %s cannot be read", key)
            continue
        found.setdefault(f"{int(worker):016x}"[-8:], []).append(metrics)
    return found


class Heard:
    """Time of the last change of each worker's metrics."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[tuple[int, ...], float]] = {}
        self.queued_tokens: dict[str, int] = {}
        """KV that each worker's preempted and waiting requests will need."""

    def update(self, engines: Mapping[str, bytes], now: float) -> None:
        """Take one tick's metrics."""
        seen = decoded(engines)
        for worker, ranks in seen.items():
            counters = tuple(rank.counter_id for rank in ranks)
            if self._last.get(worker, ((), 0.0))[0] != counters:
                self._last[worker] = (counters, now)
            queues = [rank.queued_requests for rank in ranks]
            self.queued_tokens[worker] = int(sum(q.sum_prefill_tokens + q.sum_decode_kv_tokens for q in queues))
        # Late workers are remembered until they are far beyond any limit; then they count as gone.
        for worker in [w for w, (_, at) in self._last.items() if w not in seen and now - at > 600]:
            del self._last[worker]
            self.queued_tokens.pop(worker, None)

    def age_s(self, worker: str, now: float) -> float:
        """Age of the last metrics; 0 for a worker without any, for which its report alone counts."""
        return now - self._last[worker][1] if worker in self._last else 0.0
