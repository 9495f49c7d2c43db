# SPDX-License-Identifier: Apache-2.0
"""Publishes a mocker's load for Dynamo's planner. (Dynamo publishes that of vLLM workers.)"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from components.engine.protocol import Engine
from components.errors import MigrateError

logger = logging.getLogger(__name__)
_INTERVAL_S = 0.5


async def publish(engine: Engine, endpoint: Any) -> None:
    """Publish the engine's load twice a second until cancelled. Ignores a failing engine."""
    from dynamo.llm import FpmDirectPublisher

    publisher = FpmDirectPublisher(endpoint, str(endpoint.connection_id()), 1)
    try:
        while True:
            await asyncio.sleep(_INTERVAL_S)
            try:
                stats, _ = await engine.report()
            except MigrateError as error:
                logger.debug("no forward-pass metrics: %s", error)
                continue
            publisher.publish(
                dp_rank=0,
                scheduled_num_prefill_requests=int(stats.scheduled_prefill_tokens > 0),
                scheduled_sum_prefill_tokens=stats.scheduled_prefill_tokens,
                scheduled_sum_prefill_kv_tokens=0,
                scheduled_num_decode_requests=stats.running,
                scheduled_sum_decode_kv_tokens=stats.decode_kv_tokens,
                queued_num_prefill_requests=stats.waiting,
                queued_sum_prefill_tokens=stats.queued_prefill_tokens,
                queued_num_decode_requests=0,
                queued_sum_decode_kv_tokens=0,
                wall_time_secs=stats.step_s,
            )
    finally:
        publisher.shutdown()
