# SPDX-License-Identifier: Apache-2.0
"""What Dynamo's own planner reads of a worker: its model card (capacity) and its forward-pass metrics (load)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from components.engine.protocol import EngineInfo, EngineStats
from components.errors import MigrateError
from components.metrics.worker import WorkerMetrics
from components.serve.config import WorkerConfig

logger = logging.getLogger(__name__)
_INTERVAL_S = 0.5


async def publish_card(endpoint: Any, config: WorkerConfig, info: EngineInfo, component: str) -> None:
    """Register the worker's capacity under its own endpoint, which no frontend of a graph looks at."""
    from dynamo.llm import ModelInput, ModelRuntimeConfig, ModelType, WorkerType, register_model

    limits = ModelRuntimeConfig()
    limits.total_kv_blocks = info.num_blocks
    limits.max_num_seqs = info.max_num_seqs
    limits.max_num_batched_tokens = info.max_num_batched_tokens
    limits.context_length = info.max_model_len
    prefill = component == "prefill"
    await register_model(
        ModelInput.Tokens,
        ModelType.Prefill if prefill else ModelType.Chat | ModelType.Completions,
        endpoint,
        config.model,
        config.served_model_name or None,
        worker_type=WorkerType.Prefill if prefill else WorkerType.Decode,
        needs=[[WorkerType.Decode if prefill else WorkerType.Prefill]],
        kv_cache_block_size=info.block_size,
        runtime_config=limits,
    )


async def publish_forward_pass(
    load: Callable[[float], Awaitable[EngineStats]], endpoint: Any, shown: WorkerMetrics
) -> None:
    """Publish the engine's load twice a second until cancelled; a failing engine is somebody else's to notice.

    ``load`` gives it, at most so many seconds old.
    """
    from dynamo.llm import FpmDirectPublisher

    publisher = FpmDirectPublisher(endpoint, str(endpoint.connection_id()), 1)
    try:
        while True:
            await asyncio.sleep(_INTERVAL_S)
            try:
                stats = await load(_INTERVAL_S)
            except MigrateError as error:
                logger.debug("no forward-pass metrics: %s", error)
                continue
            shown.stats = stats
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
