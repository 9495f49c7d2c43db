# SPDX-License-Identifier: Apache-2.0
"""Dynamo's own migration: after the loss of a decode worker the frontend sends the tokens to another, which recomputes.

Stock Dynamo moves requests in no other case, so each sample kills a worker (SIGKILL in the middle of the stream) and
restarts it. Two decode workers, ``dynamo.vllm`` with vLLM's NixlConnector and ``--migration-limit 3``, engine arguments
as for the other modes. Downtime is the gap in the client's stream.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import httpx

from benchmarks.migration.measure import Prompts, Sample, Watched
from benchmarks.serving.parts import Kind, Part
from benchmarks.serving.systems import System, running
from components.errors import MigrateError
from components.transfer import Transport

DYNAMO = "dynamo"
_BEFORE = 24
"""Tokens before the kill; the last ones give the undisturbed gap."""
_AFTER = 8
_TIMEOUT_S = 120.0


def measure(
    lengths: list[int],
    count: int,
    model: str,
    prompts: Prompts,
    engine: Mapping[str, Any],
    devices: tuple[int, ...] = (),
) -> Iterator[tuple[list[Sample], list[str]]]:
    """``count`` samples for each length, and failures."""
    with running(Kind.STOCK_RETRY, model, Transport.AUTO, engine=engine, devices=devices) as system:
        for tokens in lengths:
            samples: list[Sample] = []
            failed: list[str] = []
            for _ in range(count):
                try:
                    samples.append(asyncio.run(_lose_worker(system, prompts.body(tokens, 400), tokens)))
                except (MigrateError, httpx.HTTPError) as error:
                    failed.append(f"{tokens} tokens, {DYNAMO}: {error or type(error).__name__}")
            yield samples, failed


async def _lose_worker(system: System, body: dict[str, Any], tokens: int) -> Sample:
    decode = [part for part in system.parts if part.role == "decode"]
    watched = Watched()
    async with httpx.AsyncClient(base_url=system.url, timeout=_TIMEOUT_S, trust_env=False) as http:
        watched.task = asyncio.ensure_future(watched.run(http, body))
        lost: Part | None = None
        try:
            await _until(watched, _BEFORE)
            lost = await asyncio.to_thread(system.busiest, decode)
            killed = time.time()
            system.kill(lost)
            await _until(watched, len(watched.times) + _AFTER)
        finally:
            watched.task.cancel()
            with suppress(asyncio.CancelledError, httpx.HTTPError, MigrateError):
                await watched.task
            if lost is not None:
                await asyncio.to_thread(system.start, lost)
                await asyncio.to_thread(system.wait_ready, [lost])
    step = statistics.median(watched.gaps([(0.0, killed)]))
    downtime = max(watched.gaps([(killed, time.time())]))
    return Sample(
        tokens=tokens,
        mode=DYNAMO,
        downtime_s=downtime,
        added_stall_s=max(0.0, downtime - step),
        total_s=downtime,
        bytes=0,
        rounds=0,
        descriptors=0,
        lane="-",
        step_s=step,
    )


async def _until(watched: Watched, count: int) -> None:
    """Raise ``MigrateError`` when the stream ends or hangs before it has ``count`` tokens."""
    end = time.monotonic() + _TIMEOUT_S
    while len(watched.times) < count:
        if watched.task is not None and watched.task.done():
            error = watched.task.exception()
            raise MigrateError(f"the stream ended after {len(watched.times)} tokens: {error or 'no error'}")
        if time.monotonic() > end:
            raise MigrateError(f"{len(watched.times)} tokens, and no more for {_TIMEOUT_S:g} s")
        await asyncio.sleep(0.005)
