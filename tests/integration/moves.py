# SPDX-License-Identifier: Apache-2.0
"""Requests that move between two vLLM engines, as a source's worker drives them, and a client of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field

import msgspec
import pytest

from benchmarks.models import resolve
from components.engine.groups import whole_blocks
from components.engine.kv import CommitTo, Frozen, LandingStatus, RequestId
from components.engine.protocol import FinishReason, GenerateOutput, GenerateRequest, Sampling
from components.engine.vllm.engine import VLLMEngine
from components.errors import RequestNotFound
from tests.integration.vllm_engines import Pair, start_pair

DRAFTERS = {"draft_model": "tiny-llama", "eagle": "tiny-llama-eagle"}
"""Models that draft for ``tiny-llama``."""


@pytest.fixture(scope="module")
def pair(runner: asyncio.Runner, tiny_llama: str, etcd_url: str, request: pytest.FixtureRequest) -> Iterator[Pair]:
    parameters = dict(getattr(request, "param", {}))
    model = resolve(parameters.pop("model")) if "model" in parameters else tiny_llama
    if "drafts" in parameters:
        drafts = parameters.pop("drafts")
        drafter = DRAFTERS.get(drafts["method"])
        parameters["speculative_config"] = drafts | ({"model": resolve(drafter)} if drafter else {})
    pair = runner.run(start_pair(model, etcd_url, **parameters))
    yield pair
    runner.run(pair.stop())


@pytest.fixture(autouse=True)
def nothing_left(runner: asyncio.Runner, pair: Pair) -> Iterator[None]:
    yield
    for engine in (pair.a, pair.b):
        runner.run(asyncio.wait_for(empty(engine), 20))


async def empty(engine: VLLMEngine) -> None:
    """Wait for the last abort to arrive, then account for every block."""
    while (await engine.report())[1] != []:
        await asyncio.sleep(0.02)
    await engine.check_integrity()
    # vLLM keeps the blocks of an aborted request until the step in flight has ended.
    while (stats := (await engine.report())[0]).free_blocks != stats.total_blocks:
        await asyncio.sleep(0.02)


@dataclass
class Client:
    """Collects what a client would see, checking that no token is missing or doubled."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: FinishReason | None = None

    def take(self, output: GenerateOutput) -> None:
        if output.token_ids:
            assert output.index == len(self.tokens)
        self.tokens += output.token_ids
        self.logprobs += [entry.logprob for entry in output.logprobs]
        self.finish = output.finish_reason or self.finish


async def run(engine: VLLMEngine, request: GenerateRequest) -> Client:
    client = Client()
    async for output in engine.generate(request):
        client.take(output)
    return client


async def take_until(stream: AsyncIterator[GenerateOutput], client: Client, count: int) -> None:
    async for output in stream:
        client.take(output)
        if len(client.tokens) >= count:
            return


def request_of(name: str, prompt: int, sampling: Sampling, **more: object) -> GenerateRequest:
    tokens = tuple((7 * i * i + 13 * i + len(name)) % 40000 + 100 for i in range(prompt))
    return GenerateRequest(RequestId(name), tokens, sampling, **more)  # type: ignore[arg-type]


async def move(
    source: VLLMEngine,
    target: VLLMEngine,
    request: GenerateRequest,
    client: Client,
    stream: object,
    live: bool,
    replay: bool = False,
    lead: Callable[[CommitTo], CommitTo] = lambda to: to,
    late_s: float = 0.0,
) -> object:
    """One migration as a source drives it; returns the stream at the target. ``replay``: no block is copied. ``lead``:
    where a live move's direct commit goes. ``late_s``: from the state to the source's own commit.
    """
    offer = await source.offer(request.request_id)
    if replay:
        offer = whole_blocks(offer, 0)
    start = msgspec.structs.replace(request, output_token_ids=tuple(client.tokens), landing=offer)
    target_stream = target.generate(start)
    landed = asyncio.Event()
    queue: asyncio.Queue[GenerateOutput | None] = asyncio.Queue()
    given_early: list[tuple[int, ...] | None] = []

    async def pump() -> None:
        landed.set()
        async with aclosing(target_stream):
            async for output in target_stream:
                given_early.append(output.committed)
                await queue.put(output)
        await queue.put(None)

    pumping, status = asyncio.create_task(pump()), LandingStatus(reserved=False)
    await landed.wait()
    if live:
        for _ in range(400):
            await asyncio.sleep(0.01)
            if (status := await status_of(target, request.request_id)).landed:
                break
        else:
            raise AssertionError("blocks never landed")
    else:
        await arrived(target, request.request_id)
    expecting = asyncio.create_task(target.expect_commit(request.request_id, 0.2)) if live else None
    to = lead(status.commit_to) if live and not replay and status.commit_to is not None else None
    frozen = given = await source.freeze(request.request_id, to, 30.0)
    if replay:
        given = msgspec.structs.replace(frozen, offer=whole_blocks(frozen.offer, 0), checksums=(), checked=())
    await asyncio.sleep(late_s)
    # Before this commit only that of the source's engine can have let a token out.
    assert given_early[:1] in ([], [frozen.output_token_ids])
    await target.commit(request.request_id, given)
    if expecting is not None:
        await expecting
    # What the source gave before it stopped may still be on its way to us.
    while len(client.tokens) < len(frozen.output_token_ids):
        client.take(await anext(stream))  # type: ignore[call-overload]
    await source.release(request.request_id)
    async for output in stream:  # type: ignore[attr-defined]
        assert not output.token_ids
        assert output.finish_reason is FinishReason.FROZEN

    async def rest() -> AsyncIterator[GenerateOutput]:
        while (output := await queue.get()) is not None:
            yield output
        await pumping

    return rest()


SAMPLINGS = {
    "greedy": Sampling(temperature=0.0, max_tokens=150, ignore_eos=True),
    "seeded": Sampling(temperature=0.9, top_p=0.95, seed=7, max_tokens=150, ignore_eos=True),
    "penalties": Sampling(
        temperature=0.8,
        seed=11,
        presence_penalty=0.9,
        frequency_penalty=0.7,
        repetition_penalty=1.2,
        max_tokens=150,
        min_tokens=30,
    ),
    "logprobs": Sampling(temperature=0.0, logprobs=3, max_tokens=150, ignore_eos=True),
}


async def arrived(engine: VLLMEngine, request_id: RequestId) -> None:
    """Until the engine has the request: it gets it some time after the first pull of the stream."""
    while True:
        with suppress(RequestNotFound):
            await engine.landing_status(request_id)
            return
        await asyncio.sleep(0.01)


async def status_of(engine: VLLMEngine, request_id: RequestId) -> LandingStatus:
    try:
        return await engine.landing_status(request_id)
    except RequestNotFound:
        return LandingStatus(reserved=False)


async def taken_in(
    target: VLLMEngine, request: GenerateRequest, frozen: Frozen
) -> tuple[AsyncIterator[GenerateOutput], GenerateOutput]:
    """A frozen request goes on at the target: its stream, and the first output."""
    stream = target.generate(
        GenerateRequest(
            request.request_id,
            request.prompt_token_ids,
            request.sampling,
            frozen.output_token_ids,
            landing=frozen.offer,
        )
    )
    first = asyncio.ensure_future(anext(stream))
    while True:
        try:
            await target.commit(request.request_id, frozen)
            return stream, await first
        except RequestNotFound:
            await asyncio.sleep(0.01)


def moved_to_and_fro(runner: asyncio.Runner, pair: Pair, kind: str, prompt: int, live: bool) -> None:
    """A request that moves three times gives the tokens of an unmoved one."""

    async def scenario() -> None:
        sampling = SAMPLINGS[kind]
        asked = request_of(f"plain-{kind}-{prompt}-{live}", prompt, sampling)
        plain = await run(pair.a, asked)
        moved = GenerateRequest(RequestId(f"moved-{kind}-{prompt}-{live}"), asked.prompt_token_ids, sampling)
        client = Client()
        stream: object = pair.a.generate(moved)
        source, target = pair.a, pair.b
        for stop in (6, 15, 27):
            await take_until(stream, client, stop)  # type: ignore[arg-type]
            stream = await move(source, target, moved, client, stream, live)
            source, target = target, source
        async for output in stream:  # type: ignore[attr-defined]
            client.take(output)
        assert client.tokens == plain.tokens
        assert client.finish is plain.finish
        assert client.logprobs == pytest.approx(plain.logprobs, abs=0.02)

    runner.run(asyncio.wait_for(scenario(), 60))
