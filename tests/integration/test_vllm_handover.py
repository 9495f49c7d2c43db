# SPDX-License-Identifier: Apache-2.0
"""Two real vLLM engines, real NIXL, real etcd: a moved request gives the tokens of an unmoved one."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field

import msgspec
import pytest
from vllm import SamplingParams

from components.engine.groups import whole_blocks
from components.engine.kv import CommitTo, Frozen, LandingStatus, RequestId
from components.engine.protocol import FinishReason, GenerateOutput, GenerateRequest, Sampling
from components.engine.vllm import native
from components.engine.vllm.client import CoreClient
from components.engine.vllm.engine import VLLMEngine
from components.errors import NotMigratable, RequestNotFound
from components.models import resolve
from tests.integration.vllm_engines import Pair, start_pair

pytestmark = pytest.mark.integration


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
    while (await engine.requests()) != []:
        await asyncio.sleep(0.02)
    await engine.check_integrity()
    # vLLM keeps the blocks of an aborted request until the step in flight has ended.
    while (stats := await engine.stats()).free_blocks != stats.total_blocks:
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
            if (status := await _status(target, request.request_id)).landed:
                break
        else:
            raise AssertionError("blocks never landed")
    else:
        await _arrived(target, request.request_id)
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


@pytest.mark.parametrize("live", [True, False], ids=["live", "stop-and-copy"])
@pytest.mark.parametrize("prompt", [5, 31, 64, 700])
@pytest.mark.parametrize("kind", list(SAMPLINGS))
def test_moved_to_and_fro_gives_the_same_tokens(
    runner: asyncio.Runner, pair: Pair, kind: str, prompt: int, live: bool
) -> None:
    async def scenario() -> None:
        sampling = SAMPLINGS[kind]
        plain = await run(pair.a, request_of(f"plain-{kind}-{prompt}-{live}", prompt, sampling))
        moved = request_of(f"moved-{kind}-{prompt}-{live}", prompt, sampling)
        moved = GenerateRequest(moved.request_id, plain_prompt(plain, kind, prompt, live), sampling)
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


@pytest.mark.parametrize("way", ["open", "cut", "silent"])
def test_engines_commit_directly_where_they_can_and_no_token_changes(
    runner: asyncio.Runner, pair: Pair, way: str
) -> None:
    """Of the two other ways one refuses connections and one accepts them without a word."""
    silent = socket.create_server(("127.0.0.1", 0))
    port = {"open": 0, "cut": 1, "silent": silent.getsockname()[1]}[way]

    def lead(to: CommitTo) -> CommitTo:
        return msgspec.structs.replace(to, address=f"127.0.0.1:{port}") if port else to

    async def scenario() -> None:
        sampling = SAMPLINGS["seeded"]
        moved = request_of(f"directly-{way}", 300, sampling)
        plain = await run(pair.a, GenerateRequest(RequestId("plain"), moved.prompt_token_ids, sampling))
        client, source, target = Client(), pair.a, pair.b
        stream: object = source.generate(moved)
        for stop in (6, 15, 27):
            await take_until(stream, client, stop)  # type: ignore[arg-type]
            stream = await move(source, target, moved, client, stream, True, lead=lead, late_s=0.1)
            assert (await target.landing_status(moved.request_id)).direct == (way == "open")
            source, target = target, source
        async for output in stream:  # type: ignore[attr-defined]
            client.take(output)
        assert client.tokens == plain.tokens

    with silent:
        runner.run(asyncio.wait_for(scenario(), 60))


def test_a_request_that_its_engines_have_moved_alone_goes_on_there_and_can_be_taken_back(
    runner: asyncio.Runner, pair: Pair
) -> None:
    async def scenario() -> None:
        request = request_of("taken back", 200, SAMPLINGS["seeded"])
        plain = await run(pair.b, request)
        client = Client()
        stream = pair.a.generate(request)
        await take_until(stream, client, 5)
        offer = await pair.a.offer(request.request_id)
        made = tuple(client.tokens)
        landing = pair.b.generate(
            GenerateRequest(request.request_id, request.prompt_token_ids, request.sampling, made, landing=offer)
        )
        waiting = asyncio.ensure_future(anext(landing))
        while not (status := await _status(pair.b, request.request_id)).landed:
            await asyncio.sleep(0.01)
        await pair.a.freeze(request.request_id, status.commit_to, 30.0)
        while not (await _status(pair.b, request.request_id)).direct:
            await asyncio.sleep(0.01)
        while not any(row.output_tokens > len(made) + 20 for row in await pair.b.requests()):
            await asyncio.sleep(0.01)
        first = await waiting
        assert first.committed is not None and first.index == len(first.committed) >= len(made)
        assert [*first.committed, *first.token_ids] == plain.tokens[: first.index + len(first.token_ids)]
        await pair.a.resume(request.request_id)
        await pair.b.abort(request.request_id)
        assert [output async for output in landing][-1].finish_reason is FinishReason.CANCELLED
        async for output in stream:
            client.take(output)
        assert client.tokens == plain.tokens

    runner.run(asyncio.wait_for(scenario(), 60))


async def _arrived(engine: VLLMEngine, request_id: RequestId) -> None:
    """Until the engine has the request: it gets it some time after the first pull of the stream."""
    while True:
        with suppress(RequestNotFound):
            await engine.landing_status(request_id)
            return
        await asyncio.sleep(0.01)


async def _status(engine: VLLMEngine, request_id: RequestId) -> LandingStatus:
    try:
        return await engine.landing_status(request_id)
    except RequestNotFound:
        return LandingStatus(reserved=False)


@pytest.mark.slow
@pytest.mark.parametrize("pair", [{"wait_bytes": 0}], indirect=True, ids=["copies beside the steps"])
@pytest.mark.parametrize("live", [True, False], ids=["live", "stop-and-copy"])
@pytest.mark.parametrize("kind", list(SAMPLINGS))
def test_no_token_changes_when_every_copy_runs_beside_the_steps(
    runner: asyncio.Runner, pair: Pair, kind: str, live: bool
) -> None:
    test_moved_to_and_fro_gives_the_same_tokens(runner, pair, kind, 700, live)


@pytest.mark.slow
@pytest.mark.parametrize("pair", [{"async_scheduling": False}], indirect=True, ids=["one step at a time"])
@pytest.mark.parametrize("kind", list(SAMPLINGS))
def test_no_token_changes_with_the_scheduler_that_does_not_run_ahead(
    runner: asyncio.Runner, pair: Pair, kind: str
) -> None:
    test_moved_to_and_fro_gives_the_same_tokens(runner, pair, kind, 64, live=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "pair", [{"logits_processors": ["tests.integration.processors:Rotating"]}], indirect=True, ids=["logits processor"]
)
@pytest.mark.parametrize("live", [True, False], ids=["live", "stop-and-copy"])
@pytest.mark.parametrize("kind", ["greedy", "penalties"])
def test_a_logits_processor_goes_on_from_the_tokens(runner: asyncio.Runner, pair: Pair, kind: str, live: bool) -> None:
    """vLLM gives it those so far, as after a preemption."""
    test_moved_to_and_fro_gives_the_same_tokens(runner, pair, kind, 64, live)


DRAFTS = {
    "ngram": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 2, "prompt_lookup_max": 4},
    "draft model": {"method": "draft_model", "num_speculative_tokens": 3},
    "eagle": {"method": "eagle", "num_speculative_tokens": 3},
    "mtp": {"method": "mtp", "num_speculative_tokens": 1},
}
DRAFTERS = {"draft_model": "tiny-llama", "eagle": "tiny-llama-eagle"}
"""Models that draft for ``tiny-llama``."""
OF_MODEL = {"mtp": {"model": "tiny-mimo"}}
"""Models that draft themselves."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "pair",
    [
        pytest.param({"drafts": drafts, "dtype": "float32"} | OF_MODEL.get(name, {}), id=name)
        for name, drafts in DRAFTS.items()
    ],
    indirect=True,
)
@pytest.mark.parametrize("live", [True, False], ids=["live", "stop-and-copy"])
@pytest.mark.parametrize("prompt", [31, 700])
@pytest.mark.parametrize("kind", ["greedy", "logprobs"])
def test_no_token_changes_with_drafts(runner: asyncio.Runner, pair: Pair, kind: str, prompt: int, live: bool) -> None:
    test_moved_to_and_fro_gives_the_same_tokens(runner, pair, kind, prompt, live)


@pytest.mark.slow
@pytest.mark.parametrize("pair", [pytest.param({"drafts": DRAFTS["ngram"]}, id="ngram")], indirect=True)
def test_a_seeded_request_beside_drafts_stays(runner: asyncio.Runner, pair: Pair) -> None:
    async def scenario() -> None:
        request = request_of("seeded-with-drafts", 40, SAMPLINGS["seeded"])
        stream, client = pair.a.generate(request), Client()
        await take_until(stream, client, 5)
        with pytest.raises(NotMigratable, match="seed"):
            await pair.a.freeze(request.request_id)
        async for output in stream:
            client.take(output)
        assert client.finish is FinishReason.LENGTH

    runner.run(asyncio.wait_for(scenario(), 60))


@pytest.mark.slow
@pytest.mark.parametrize("pair", [{"model": "smollm2", "dtype": "bfloat16"}], indirect=True, ids=["bfloat16"])
@pytest.mark.parametrize("live", [True, False], ids=["live", "stop-and-copy"])
@pytest.mark.parametrize(("temperature", "seed"), [(0.0, None), (0.7, 11), (1.5, 5)])
def test_no_bit_of_a_log_probability_changes_in_bfloat16(
    runner: asyncio.Runner, pair: Pair, temperature: float, seed: int | None, live: bool
) -> None:
    """Below the length from which the attention kernel's order of summing depends on the step."""

    async def scenario() -> None:
        sampling = Sampling(temperature=temperature, seed=seed, max_tokens=200, ignore_eos=True, logprobs=0)
        for prompt in (7, 60, 200):
            request = request_of(f"bf-{temperature}-{prompt}-{live}", prompt, sampling)
            client, source, target = Client(), pair.a, pair.b
            stream: object = source.generate(request)
            for stop in (6, 40, 80, 120, 160):
                await take_until(stream, client, stop)  # type: ignore[arg-type]
                stream = await move(source, target, request, client, stream, live)
                source, target = target, source
            async for output in stream:  # type: ignore[attr-defined]
                client.take(output)
            plain = await run(pair.a, GenerateRequest(RequestId("plain"), request.prompt_token_ids, sampling))
            assert (client.tokens, client.logprobs) == (plain.tokens, plain.logprobs)

    runner.run(asyncio.wait_for(scenario(), 200))


def plain_prompt(_: Client, kind: str, prompt: int, live: bool) -> tuple[int, ...]:
    return request_of(f"plain-{kind}-{prompt}-{live}", prompt, SAMPLINGS[kind]).prompt_token_ids


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


@pytest.mark.parametrize("kind", list(SAMPLINGS))
def test_prefill_hands_over_after_the_first_token(runner: asyncio.Runner, pair: Pair, kind: str) -> None:
    async def scenario() -> None:
        sampling = SAMPLINGS[kind]
        request = request_of(f"handoff-{kind}", 300, sampling)
        plain = await run(pair.b, request)
        client = Client()
        frozen = None
        prefill = pair.a.generate(
            GenerateRequest(request.request_id, request.prompt_token_ids, sampling, freeze_after=1)
        )
        async for output in prefill:
            client.take(output)
            if output.frozen is not None:
                frozen = output.frozen
                break
        assert frozen is not None and len(client.tokens) == 1
        target, first = await taken_in(pair.b, request, frozen)
        client.take(first)
        await pair.a.release(request.request_id)
        async for output in prefill:
            assert not output.token_ids
        async for output in target:
            client.take(output)
        assert client.tokens == plain.tokens

    runner.run(asyncio.wait_for(scenario(), 60))


@pytest.mark.parametrize("kind", list(SAMPLINGS))
def test_replay_continues_with_the_same_tokens(runner: asyncio.Runner, pair: Pair, kind: str) -> None:
    async def scenario() -> None:
        request = request_of(f"replay-{kind}", 100, SAMPLINGS[kind])
        plain = await run(pair.a, request)
        again = GenerateRequest(
            RequestId(f"again-{kind}"), request.prompt_token_ids, request.sampling, tuple(plain.tokens[:13])
        )
        client = Client(tokens=list(plain.tokens[:13]))
        async for output in pair.b.generate(again):
            client.take(output)
        assert client.tokens == plain.tokens

    runner.run(asyncio.wait_for(scenario(), 60))


def test_a_request_that_nobody_marked_can_be_frozen_and_moved(runner: asyncio.Runner, pair: Pair) -> None:
    """What Dynamo's own worker sends to vLLM has no marker of ours."""

    async def scenario() -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        expected = await run(pair.a, request_of("unmarked", 300, SAMPLINGS["seeded"]))
        request = request_of("unmarked", 300, SAMPLINGS["seeded"])
        params = SamplingParams(
            temperature=0.9,
            top_p=0.95,
            seed=7,
            max_tokens=150,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        llm = pair.a._llm
        stream = llm.generate({"prompt_token_ids": list(request.prompt_token_ids)}, params, "unmarked")
        tokens: list[int] = []
        async for output in stream:
            tokens += output.outputs[0].token_ids
            if len(tokens) >= 10:
                break
        client = CoreClient(llm)
        internal = client.internal_id(request.request_id)
        assert internal is not None and internal != request.request_id
        frozen = await client.freeze(internal)
        target, first = await taken_in(pair.b, request, frozen)
        await llm.abort("unmarked")
        moved = Client(list(frozen.output_token_ids))
        moved.take(first)
        async for output in target:
            moved.take(output)
        assert moved.tokens == expected.tokens
        await stream.aclose()

    runner.run(asyncio.wait_for(scenario(), 60))


def test_frozen_request_resumes_as_if_nothing_had_happened(runner: asyncio.Runner, pair: Pair) -> None:
    async def scenario() -> None:
        request = request_of("resume", 200, SAMPLINGS["seeded"])
        plain = await run(pair.b, request)
        client = Client()
        stream = pair.a.generate(request)
        await take_until(stream, client, 10)
        frozen = await pair.a.freeze(request.request_id)
        assert frozen.output_token_ids == tuple(plain.tokens[: len(frozen.output_token_ids)])
        await asyncio.sleep(0.3)
        assert (await pair.a.freeze(request.request_id)) == frozen
        await pair.a.resume(request.request_id)
        async for output in stream:
            client.take(output)
        assert client.tokens == plain.tokens

    runner.run(asyncio.wait_for(scenario(), 60))


def test_caches_on_a_host_can_be_mapped_by_other_workers(pair: Pair) -> None:
    assert pair.a.info.lanes[0] == pair.b.info.lanes[0] == "shm/mapped"
    assert pair.a.info.fingerprint == pair.b.info.fingerprint


def test_what_cannot_travel_exactly_is_refused_with_the_reason(runner: asyncio.Runner, pair: Pair) -> None:
    async def scenario() -> None:
        request = request_of("prompt-logprobs", 20, Sampling(prompt_logprobs=1, max_tokens=30, ignore_eos=True))
        client = Client()
        stream = pair.a.generate(request)
        await take_until(stream, client, 3)
        with pytest.raises(NotMigratable, match="prompt_logprobs"):
            await pair.a.freeze(request.request_id)
        async for output in stream:
            client.take(output)
        assert len(client.tokens) == 30
        with pytest.raises(RequestNotFound):
            await pair.a.freeze(request.request_id)

    runner.run(asyncio.wait_for(scenario(), 60))


def test_a_commit_that_never_comes_stops_nobody(runner: asyncio.Runner, pair: Pair) -> None:
    async def scenario() -> None:
        neighbour = request_of("neighbour", 40, SAMPLINGS["greedy"])
        plain = await run(pair.b, neighbour)
        request = request_of("expected", 200, SAMPLINGS["greedy"])
        stream = pair.a.generate(request)
        await take_until(stream, Client(), 5)
        offer = await pair.a.offer(request.request_id)
        landing = pair.b.generate(
            GenerateRequest(request.request_id, request.prompt_token_ids, request.sampling, landing=offer)
        )
        waiting = asyncio.ensure_future(anext(landing))
        beside = asyncio.ensure_future(run(pair.b, neighbour))
        await asyncio.sleep(0.1)
        await pair.b.expect_commit(request.request_id, 60.0)
        await pair.b.abort(request.request_id)
        assert (await waiting).finish_reason is FinishReason.CANCELLED
        assert (await beside).tokens == plain.tokens
        await pair.a.abort(request.request_id)

    runner.run(asyncio.wait_for(scenario(), 60))


OWN_OPTIONS: dict[str, dict[str, object]] = {
    "flat_logprobs": {"flat_logprobs": True, "logprobs": 2},
    "stop": {"stop": ["no such text"], "detokenize": True},
    "routed_experts_prompt_start": {"routed_experts_prompt_start": 1},
}


@pytest.mark.parametrize("option", list(OWN_OPTIONS))
def test_options_of_vllms_own_are_served_and_keep_a_request_where_it_is(
    runner: asyncio.Runner, pair: Pair, option: str
) -> None:
    async def scenario() -> None:
        request = request_of(f"own-{option}", 40, SAMPLINGS["greedy"])
        plain = await run(pair.a, request)
        prompt = {"prompt_token_ids": list(request.prompt_token_ids)}
        params = SamplingParams(temperature=0.0, max_tokens=150, ignore_eos=True, **OWN_OPTIONS[option])  # type: ignore[arg-type]
        assert native.why_fixed(prompt, params, {})
        [*_, last] = [item async for item in pair.a._llm.generate(prompt, params, f"served-{option}")]
        assert list(last.outputs[0].token_ids) == plain.tokens

    runner.run(asyncio.wait_for(scenario(), 60))


def test_an_aborted_landing_leaves_no_block_behind(runner: asyncio.Runner, pair: Pair) -> None:
    async def scenario() -> None:
        request = request_of("abandoned", 400, SAMPLINGS["greedy"])
        client = Client()
        stream = pair.a.generate(request)
        await take_until(stream, client, 5)
        offer = await pair.a.offer(request.request_id)
        landing = pair.b.generate(
            GenerateRequest(
                request.request_id, request.prompt_token_ids, request.sampling, tuple(client.tokens), landing=offer
            )
        )
        waiting = asyncio.ensure_future(anext(landing))
        await asyncio.sleep(0.2)
        await pair.b.abort(request.request_id)
        assert (await waiting).finish_reason is FinishReason.CANCELLED
        async for output in stream:
            client.take(output)
        assert len(client.tokens) == 150

    runner.run(asyncio.wait_for(scenario(), 60))


def test_a_source_that_has_given_the_blocks_to_others_is_not_believed(runner: asyncio.Runner, pair: Pair) -> None:
    async def scenario() -> None:
        request = request_of("given away", 700, SAMPLINGS["greedy"])
        expected = await run(pair.a, request)
        stream = pair.a.generate(request)
        await take_until(stream, Client(), 5)
        frozen = await pair.a.freeze(request.request_id)
        await pair.a.abort(request.request_id)
        for number in range(6):
            others = request_of("x" * (number + 20), 1900, Sampling(temperature=0.0, max_tokens=2))
            await run(pair.a, others)
        before = (await pair.b.stats()).kv_refused.get("integrity", 0)
        target, first = await taken_in(pair.b, request, frozen)
        client = Client(list(frozen.output_token_ids))
        client.take(first)
        async for output in target:
            client.take(output)
        assert client.tokens == expected.tokens
        assert (await pair.b.stats()).kv_refused["integrity"] == before + 1

    runner.run(asyncio.wait_for(scenario(), 120))
