# SPDX-License-Identifier: Apache-2.0
"""One engine as a Dynamo component: endpoint ``generate`` (stream) and ``control`` (call and answer).

Life cycle: the engine starts first, then the endpoints; on SIGTERM the worker reports itself as draining,
the router moves its requests away, and it ends when none is left or the grace period is over.
Errors: what the engine raises goes to the caller as (code, message); nothing kills the worker but its engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

from components import process
from components.engine.protocol import (
    Engine,
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerateOutput,
    LandingStatus,
    RequestId,
    RequestInfo,
)
from components.errors import DeadlineExceeded, InvalidRequest, MigrateError, RequestNotFound
from components.messages import Generate, WorkerCall, WorkerOp, WorkerReply, pack, unpack
from components.metrics.export import address, expose
from components.metrics.worker import WorkerMetrics
from components.serve.config import WorkerConfig, load_component_config
from components.worker.busy import computes
from components.worker.engines import build_engine
from components.worker.metrics import publish_card, publish_forward_pass
from components.worker.outputs import OutputServer

logger = logging.getLogger(__name__)
_POLL_S = 0.004
_MAX_HOLD_S = 5.0
"""Longest time for which a call is kept without an answer."""


class WorkerService:
    """The two endpoints of a worker."""

    def __init__(self, engine: Engine, info: EngineInfo, metrics: str = "") -> None:
        self._metrics = metrics
        self._outputs = OutputServer()
        self._outputs_address = ""
        self._engine = engine
        self._info = info
        self._stats: EngineStats | None = None
        self._stats_at = 0.0
        self.draining = False

    async def listen(self, host: str) -> None:
        """Let routers connect for the outputs of all their requests."""
        self._outputs_address = await self._outputs.start(host)

    def stop(self) -> None:
        """Take no more connections."""
        self._outputs.stop()

    async def generate(self, payload: Any, context: Any) -> AsyncIterator[dict[str, str]]:
        """Run a request and give its outputs, in the stream or on the caller's channel; a vanished caller aborts it."""
        request_id = RequestId("")
        outlet, leg = None, 0
        try:
            message = unpack(payload, Generate)
            outlet, leg = self._outputs.find(message.channel), message.leg
            request_id = message.request.request_id
            stream = self._engine.generate(message.request)
            watch = asyncio.ensure_future(self._abort_when_stopped(context, request_id))
            try:
                async for output in self._committed(message, stream):
                    if outlet is None:
                        yield pack(output)
                    elif not outlet.give(leg, output):
                        return
            finally:
                watch.cancel()
        except MigrateError as error:
            failed = GenerateOutput(0, finish_reason=FinishReason.ERROR, error=(error.code, str(error)))
            if outlet is None:
                yield pack(failed)
            else:
                outlet.give(leg, failed)

    async def _committed(
        self, message: Generate, stream: AsyncIterator[GenerateOutput]
    ) -> AsyncIterator[GenerateOutput]:
        if message.frozen is not None:
            # The request enters the engine with the first pull; only then can it be committed.
            first = asyncio.ensure_future(anext(stream))
            try:
                await self._commit_when_known(message)
                output = await first
            except BaseException:
                # Also when the caller has gone: nobody else would end the request.
                first.cancel()
                with contextlib.suppress(MigrateError):
                    await self._engine.abort(message.request.request_id)
                await asyncio.gather(first, return_exceptions=True)
                raise
            yield output
        async for output in stream:
            yield output

    async def _commit_when_known(self, message: Generate, timeout_s: float = 10.0) -> None:
        if message.frozen is None:
            return
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            try:
                await self._engine.commit(message.request.request_id, message.frozen)
                return
            except RequestNotFound:
                await asyncio.sleep(0.002)
        raise DeadlineExceeded("the engine did not take the request in")

    async def _abort_when_stopped(self, context: Any, request_id: RequestId) -> None:
        await context.async_killed_or_stopped()
        await self._engine.abort(request_id)

    async def control(self, payload: Any) -> AsyncIterator[dict[str, str]]:
        """Answer one call."""
        try:
            yield pack(await self._answer(unpack(payload, WorkerCall)))
        except MigrateError as error:
            yield pack(WorkerReply(error=(error.code, str(error))))

    async def _answer(self, call: WorkerCall) -> WorkerReply:
        engine, request_id = self._engine, call.request_id
        match call.op:
            case WorkerOp.INFO:
                stats, requests = await self._report()
                return WorkerReply(
                    info=self._info,
                    stats=stats,
                    requests=tuple(requests),
                    draining=self.draining,
                    metrics=self._metrics,
                    outputs=self._outputs_address,
                )
            case WorkerOp.OFFER:
                return WorkerReply(offer=await engine.offer(request_id))
            case WorkerOp.FREEZE:
                return WorkerReply(frozen=await engine.freeze(request_id))
            case WorkerOp.RESUME:
                await engine.resume(request_id)
            case WorkerOp.RELEASE:
                await engine.release(request_id)
            case WorkerOp.ABORT:
                await engine.abort(request_id)
            case WorkerOp.LANDING:
                return WorkerReply(landing=await self._landing(request_id, call.hold_s))
            case WorkerOp.EXTEND if call.offer is not None:
                await engine.extend(request_id, call.offer, call.tokens)
            case WorkerOp.EXPECT_COMMIT:
                await engine.expect_commit(request_id, call.hold_s)
            case WorkerOp.COMMIT if call.frozen is not None:
                await engine.commit(request_id, call.frozen)
            case WorkerOp.CHECK:
                await engine.check_integrity()
            case WorkerOp.BUSY:
                return WorkerReply(busy=await computes())
            case _:
                raise InvalidRequest(f"call {call.op} lacks its arguments")
        return WorkerReply()

    async def _report(self) -> tuple[EngineStats, list[RequestInfo]]:
        report = await self._engine.report()
        self._stats, self._stats_at = report[0], time.monotonic()
        return report

    async def load(self, max_age_s: float) -> EngineStats:
        """The engine's load; what a router was told is good enough while it is not older than that."""
        if self._stats is None or time.monotonic() - self._stats_at > max_age_s:
            return (await self._report())[0]
        return self._stats

    async def _landing(self, request_id: RequestId, hold_s: float) -> LandingStatus:
        """Progress of a landing, once its blocks are there or after ``hold_s``; the request may still be on its way."""
        end = time.monotonic() + min(hold_s, _MAX_HOLD_S)
        while True:
            over = time.monotonic() >= end
            try:
                status = await self._engine.landing_status(request_id)
                if status.landed or over:
                    return status
            except RequestNotFound:
                if over:
                    raise
            await asyncio.sleep(_POLL_S)

    async def drained(self, grace_s: float) -> None:
        """Report as draining and wait until the router has moved everything away."""
        self.draining = True
        end = time.monotonic() + grace_s
        # The router asks twice a second: give it time to notice before the first look.
        await asyncio.sleep(1.0)
        while time.monotonic() < end and await self._engine.requests():
            await asyncio.sleep(0.1)
        left = await self._engine.requests()
        if left:
            logger.warning("%d requests are left after %g s; the router replays them", len(left), grace_s)


async def serve(component: str) -> None:
    """Start the engine, serve, drain, stop."""
    stop = process.on_stop()
    config = load_component_config(WorkerConfig)
    replica = os.environ.get("DYN_MIGRATE_REPLICA", "0")
    name = f"{socket.gethostname()}-{component}-{replica}-{os.environ.get('DYN_MIGRATE_COMPONENT', component)}"
    engine = build_engine(config, name)
    info = await engine.start()
    runtime = process.connect()
    service = WorkerService(engine, info, address(config.advertise_host))
    await service.listen(config.advertise_host)
    prefix = f"{process.namespace()}.{component}"
    endpoint, shown = runtime.endpoint(f"{prefix}.generate"), WorkerMetrics()
    expose(shown.registry, endpoint, process.namespace(), component)
    serving = [
        asyncio.ensure_future(runtime.endpoint(f"{prefix}.control").serve_endpoint(service.control)),
        asyncio.ensure_future(endpoint.serve_endpoint(service.generate)),
    ]
    try:
        await publish_card(runtime.endpoint(f"{prefix}.generate"), config, info, component)
        process.ready()
        logger.info("%s serves %s: %d KV blocks of %d tokens", name, info.model, info.num_blocks, info.block_size)
        health = asyncio.ensure_future(_watch_health(engine))
        metrics = asyncio.ensure_future(publish_forward_pass(service.load, endpoint, shown))
        await asyncio.wait([asyncio.ensure_future(stop.wait()), health, *serving], return_when=asyncio.FIRST_COMPLETED)
        if health.done():
            health.result()
        health.cancel()
        metrics.cancel()
        if stop.is_set():
            await service.drained(config.drain_grace_s)
    finally:
        service.stop()
        runtime.shutdown()
        await asyncio.wait(serving, timeout=5.0)
        await engine.stop()


async def _watch_health(engine: Engine) -> None:
    while True:
        await asyncio.sleep(1.0)
        await engine.check_health()


def main(component: str) -> None:
    """Entry point of the worker modules."""
    process.run(lambda: serve(component))
