# SPDX-License-Identifier: Apache-2.0
"""A worker whose engine has KV blocks and no model: ``python -m components.worker.mocker``.

It serves the same endpoints as a ``dynamo.vllm`` worker with migration, behind the same frontend, and starts fast.
Use: tests, trying out policies, and an example of another engine behind ``components.migration``.

Configuration: ``DYN_MIGRATE_CONFIG`` (``components.config.WorkerConfig`` as JSON) and ``DYN_MIGRATE_MODE``, as
``dynamo serve`` sets them.
Life cycle: as ``dynamo_vllm``; on SIGTERM it drains. Prefill mockers answer at once; decode mockers compute the prompt.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec

from components import env, process
from components.config import WorkerConfig, load_component_config
from components.engine.kv import RequestId
from components.engine.protocol import EngineInfo, GenerateOutput
from components.errors import EngineKiller, InvalidRequest
from components.metrics.export import address, expose
from components.migration.faces import PROTOCOL_FACE
from components.migration.legs import Leg
from components.migration.options import Options
from components.migration.peers import Peers, short
from components.migration.repeats import Repeat
from components.migration.requests import Requests
from components.worker import forward_pass, mocker_payload, unrepeated
from components.worker.control import Control
from components.worker.engines import build_engine
from components.worker.settings import WorkerSettings
from components.worker.state import WorkerStatus


class Mocker:
    """The ``generate`` endpoint."""

    def __init__(self, requests: Requests, info: EngineInfo) -> None:
        self._requests = requests
        self._info = info

    async def generate(self, payload: dict[str, Any], context: Any) -> AsyncGenerator[dict[str, Any], None]:
        """Dynamo's handler of a decode worker."""
        stop = asyncio.ensure_future(self._abort_when_stopped(context))
        try:
            async with aclosing(self._outputs(payload, str(context.id()))) as outputs:
                async for output in outputs:
                    yield mocker_payload.chunk(output)
        except (InvalidRequest, EngineKiller) as error:
            from dynamo.llm.exceptions import InvalidArgument

            raise InvalidArgument(str(error)) from None
        except Repeat as repeat:
            from dynamo.llm.exceptions import Disconnected

            raise Disconnected(str(repeat)) from None
        finally:
            stop.cancel()

    async def _abort_when_stopped(self, context: Any) -> None:
        await context.async_killed_or_stopped()
        request_id = RequestId(str(context.id()))
        if not await self._requests.abort(request_id):
            await self._requests.engine.abort(request_id)

    def _outputs(self, payload: dict[str, Any], request_id: str) -> AsyncGenerator[GenerateOutput, None]:
        request = mocker_payload.to_request(request_id, payload, self._info.max_model_len)
        native = functools.partial(msgspec.msgpack.encode, request.sampling)
        limit = request.sampling.max_tokens
        repeated = self._requests.repeated(request.request_id, request.prompt_token_ids, native, limit)
        if repeated is not None:
            return repeated
        leg = Leg(
            request.request_id,
            request.request_id,
            request.prompt_token_ids,
            native,
            attached=unrepeated.why(payload),
            max_tokens=limit,
        )
        outputs = self._requests.suspects.watched(self._requests.engine.generate(request))
        return self._requests.serve(leg, outputs, PROTOCOL_FACE)


async def prefill(payload: dict[str, Any], context: Any) -> AsyncGenerator[dict[str, Any], None]:
    """Dynamo's handler of a prefill worker, without hand-off."""
    yield {"token_ids": [0], "index": 0, "disaggregated_params": {"kv_transfer_params": {"do_remote_prefill": False}}}


async def serve() -> None:
    """Start the engine, serve, drain, stop."""
    stop = process.on_stop()
    config = load_component_config(WorkerConfig)
    settings = WorkerSettings.from_environment()
    mode = env.MODE.read()
    component = "prefill" if mode == "prefill" else "backend"
    engine = build_engine(config, str(settings.agent["name"]))
    info = await engine.start()
    runtime = process.connect()
    prefix = f"{process.namespace()}.{component}"
    endpoint = runtime.endpoint(f"{prefix}.generate")
    instance = int(endpoint.connection_id())
    peers = await Peers.of_worker(runtime, process.namespace(), component, endpoint, settings.components, mode)
    requests = Requests(engine, peers, instance, info.fingerprint, Options(repeats=settings.repeats))
    status = WorkerStatus(requests, short(instance), mode, info, endpoint, address(config.advertise_host))
    expose(status.metrics(), endpoint, process.namespace(), component)
    control = Control(requests, status, host=config.advertise_host)
    handler = prefill if mode == "prefill" else Mocker(requests, info).generate
    serving = [
        asyncio.ensure_future(runtime.endpoint(f"{prefix}.migrate").serve_endpoint(control.serve)),
        asyncio.ensure_future(endpoint.serve_endpoint(handler)),
    ]
    beside = [asyncio.ensure_future(requests.sweep()), asyncio.ensure_future(forward_pass.publish(engine, endpoint))]
    try:
        await _register(endpoint, config, info, mode)
        process.ready()
        await asyncio.wait([asyncio.ensure_future(stop.wait()), *serving], return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set():
            await status.leave(settings.drain_s)
    finally:
        for task in beside:
            task.cancel()
        runtime.shutdown()
        await asyncio.wait(serving, timeout=5.0)
        await engine.stop()


async def _register(endpoint: Any, config: WorkerConfig, info: EngineInfo, mode: str) -> None:
    from dynamo.llm import ModelInput, ModelRuntimeConfig, ModelType, WorkerType, register_model

    limits = ModelRuntimeConfig()
    limits.total_kv_blocks = info.num_blocks
    limits.max_num_seqs = info.max_num_seqs
    limits.max_num_batched_tokens = info.max_num_batched_tokens
    limits.context_length = info.max_model_len
    worker_type, needs = {
        "prefill": (WorkerType.Prefill, [[WorkerType.Decode]]),
        "decode": (WorkerType.Decode, [[WorkerType.Prefill]]),
        "agg": (WorkerType.Aggregated, []),
    }[mode]
    await register_model(
        ModelInput.Tokens,
        ModelType.Prefill if mode == "prefill" else ModelType.Chat | ModelType.Completions,
        endpoint,
        config.model,
        config.served_model_name or None,
        worker_type=worker_type,
        needs=needs,
        kv_cache_block_size=info.block_size,
        runtime_config=limits,
    )


if __name__ == "__main__":
    process.run(serve)
