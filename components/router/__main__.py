# SPDX-License-Identifier: Apache-2.0
"""Runs one router: ``python -m components.router``."""

from __future__ import annotations

import asyncio
import hashlib
from functools import partial

from dynamo.llm import ModelInput, ModelRuntimeConfig, ModelType, WorkerType, register_model
from transformers import AutoTokenizer

from components import process
from components.metrics.export import expose
from components.router.service import RouterService
from components.serve.config import RouterConfig, load_component_config


async def serve() -> None:
    """Wait for workers, register the model with the frontend, serve until stopped."""
    stop = process.on_stop()
    config = load_component_config(RouterConfig)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    runtime = process.connect()
    service = RouterService(config, runtime, tokenizer)
    polling = asyncio.ensure_future(service.run())
    while not any(w.role == "decode" and w.available for w in service.pool.workers.values()):
        if polling.done():
            polling.result()
        if stop.is_set():
            return
        await asyncio.sleep(0.1)
    prefix = f"{process.edge_namespace()}.router"
    endpoint = runtime.endpoint(f"{prefix}.generate")
    expose(service.metrics.registry, endpoint, process.edge_namespace(), "router")
    serving = [
        asyncio.ensure_future(endpoint.serve_endpoint(service.generate)),
        asyncio.ensure_future(runtime.endpoint(f"{prefix}.control").serve_endpoint(service.control)),
    ]
    limits = ModelRuntimeConfig()
    limits.context_length = service.max_model_len()
    card = partial(
        register_model,
        *(ModelInput.Tokens, ModelType.Chat | ModelType.Completions),
        worker_type=WorkerType.Aggregated,
        # The frontend refuses longer prompts itself, with OpenAI's error.
        runtime_config=limits,
        needs=[],
    )
    try:
        await card(endpoint, config.model, config.served_model_name or None)
        for name in config.lora_modules:
            # As a model with an endpoint of its own. Dynamo's card for adapters needs the model's card before it, and
            # stays unknown to a frontend that reads them in the other order.
            own = runtime.endpoint(f"{prefix}.generate-{hashlib.sha256(name.encode()).hexdigest()[:12]}")
            serving.append(asyncio.ensure_future(own.serve_endpoint(service.generate)))
            await card(own, config.model, name)
        process.ready()
        await asyncio.wait([asyncio.ensure_future(stop.wait()), polling, *serving], return_when=asyncio.FIRST_COMPLETED)
    finally:
        polling.cancel()
        runtime.shutdown()
        await asyncio.wait(serving, timeout=5.0)


if __name__ == "__main__":
    process.run(serve)
