# SPDX-License-Identifier: Apache-2.0
"""Small paged engines for tests, in one process, with a check of their blocks at the end."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from components.engine.kv import RequestId
from components.engine.paged import PagedEngine, PagedOptions
from components.engine.protocol import FinishReason, GenerateOutput, GenerateRequest, Sampling
from components.transfer import TransferAgent

SMALL: dict[str, Any] = {"num_blocks": 32, "block_size": 4, "max_model_len": 120, "vocab_size": 1000}


def new_engine(namespace: str, name: str, agents: Any = TransferAgent, **options: Any) -> PagedEngine:
    """An engine whose agent lives in this process's memory."""
    agent = {"name": name, "namespace": namespace, "backends": ("local",)}
    return PagedEngine(PagedOptions(agent, **{**SMALL, **options}), agents)


@asynccontextmanager
async def engines(count: int = 2, **options: Any) -> AsyncIterator[list[PagedEngine]]:
    """Started engines that know each other; at the end none may hold a block."""
    namespace = uuid.uuid4().hex
    made = [new_engine(namespace, f"engine-{number}", **options) for number in range(count)]
    for engine in made:
        await engine.start()
    try:
        yield made
        for engine in made:
            await engine.check_integrity()
            stats = (await engine.report())[0]
            assert stats.free_blocks == stats.total_blocks, (await engine.report())[1]
    finally:
        for engine in made:
            await engine.stop()


def request(name: str = "r", length: int = 10, count: int = 20, **more: Any) -> GenerateRequest:
    """A request of ``length`` prompt tokens that ends after ``count`` new ones."""
    fields = {
        "seed",
        "temperature",
        "logprobs",
        "stop_token_ids",
        "min_tokens",
        "n",
        "prompt_logprobs",
        "presence_penalty",
    }
    sampling = {key: more.pop(key) for key in list(more) if key in fields}
    prompt = tuple(1 + (7 * i + len(name) * 13) % 997 for i in range(length))
    return GenerateRequest(RequestId(name), prompt, Sampling(max_tokens=count, **sampling), **more)


async def collect(stream: AsyncIterator[GenerateOutput]) -> tuple[list[int], FinishReason | None]:
    """All tokens of a stream, and why it ended."""
    tokens: list[int] = []
    reason = None
    async for output in stream:
        tokens += output.token_ids
        reason = output.finish_reason
    return tokens, reason
