# SPDX-License-Identifier: Apache-2.0
"""Disaggregated prefill at the workers: who lends, which first token is given out, what reaches the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from PIL import Image
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.logprobs import Logprob
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.engine.exceptions import EngineDeadError

from components.engine.kv import Frozen, KVOffer, RequestId
from components.engine.protocol import FinishReason, GenerateOutput, TokenLogprob
from components.engine.vllm import native
from components.engine.vllm.control import MARKER, Lent, decode_marker, encode
from components.engine.vllm.sampling import logprobs_of
from components.messages import pack, unpack
from components.migration.messages import Attached, Handover, Owner, WorkerCall, WorkerOp, WorkerReply
from components.migration.options import Options
from components.migration.requests import Requests
from components.worker.engine_client import EngineClient
from components.worker.handoff import Handoffs, is_prefill, why_not_first
from tests.unit.test_handoff import AGENT, BLOCK, frozen_of


class Peers:
    """Records the calls of a worker."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, WorkerCall]] = []
        self.gives: list[Attached] = []

    def instances(self) -> list[int]:
        return [1, 2]

    async def call(self, instance: int, call: WorkerCall, timeout_s: float = 20.0) -> WorkerReply:
        self.calls.append((instance, call))
        return WorkerReply()

    async def attach(
        self, owner: Owner, request_id: RequestId, index: int, token_ids: tuple[int, ...] = ()
    ) -> AsyncGenerator[Attached, None]:
        for item in self.gives:
            yield item


def worker(lease_s: float = 60.0) -> tuple[Handoffs, Requests, Peers, list[RequestId]]:
    peers, freed = Peers(), list[RequestId]()
    requests = Requests(None, peers, 5, "same", Options())  # type: ignore[arg-type]

    async def free(vllm_id: RequestId, expired: bool) -> None:
        freed.append(vllm_id)

    return Handoffs(requests, free, lease_s, 100), requests, peers, freed


def output_of(tokens: list[int], finish: str | None = None, logprob: float | None = None) -> RequestOutput:
    rows: Any = None if logprob is None else [{tokens[0]: SimpleNamespace(logprob=logprob, rank=1)}]
    sample = CompletionOutput(0, "", tokens, None, rows, finish_reason=finish)
    return RequestOutput("r", None, [1, 2, 3, 4], None, [sample], finished=finish is not None)


def asked(given: Handover | None = None, **params: Any) -> SamplingParams:
    transfer = {"do_remote_prefill": True, MARKER: pack(given)} if given else {"do_remote_decode": True}
    return native.with_transfer(SamplingParams(**params), transfer)


HANDOVER = Handover(fingerprint="same", instance=9, frozen=frozen_of(prompt=3), logprobs=(TokenLogprob(-0.5, 1),))


async def test_a_prefill_worker_says_who_lends_and_frees_at_the_call_or_at_the_end_of_the_lease() -> None:
    handoffs, requests, _, freed = worker(lease_s=0.02)
    params = asked(min_tokens=1, max_tokens=1, n=2)
    assert is_prefill(params)
    lending = handoffs.lending(params, RequestId("r"))
    assert decode_marker(native.transfer_of(lending)[MARKER]).lend and (lending.min_tokens, lending.n) == (0, 1)
    for number in (1, 2):
        frozen = Frozen(KVOffer(RequestId(f"p-{number}"), (AGENT,), BLOCK, (1,), 3, 0), (7,))
        item = output_of([7], "length", logprob=-0.25)
        item.kv_transfer_params = {"do_remote_prefill": True, MARKER: encode(Lent(frozen))}
        handoffs.lent(item)
        told = unpack(item.kv_transfer_params[MARKER], Handover)
        assert (told.instance, told.fingerprint) == (5, "same")
        assert told.frozen == msgspec.structs.replace(frozen, use_within_s=0.01)
        assert told.logprobs[0].logprob == -0.25
    await handoffs.release(RequestId("p-1"))
    assert freed == ["p-1"] and handoffs.num_lent == 1
    while handoffs.num_lent:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0)
    assert freed == ["p-1", "p-2"] and requests.handoffs["lease_over"] == 1


async def read(handoffs: Handoffs, params: SamplingParams, engine_gives: list[RequestOutput]) -> Any:
    """The items a handler gets, and how the engine was asked."""
    tokens = [1, 2, 3]
    given = handoffs.read(params)
    entry = handoffs.enter(RequestId("r"), {"prompt_token_ids": tokens}, params, tokens, given)

    async def own() -> AsyncGenerator[RequestOutput, None]:
        for item in engine_gives:
            yield item

    face = native.OutputFace("r", tokens)
    return [item async for item in handoffs.stream(entry, own(), face, tokens)], entry


async def test_the_first_token_is_given_out_before_the_engines_and_counted_as_output() -> None:
    handoffs, requests, peers, _ = worker()
    items, entry = await read(handoffs, asked(HANDOVER, max_tokens=5), [output_of([8]), output_of([9], "length")])
    assert [item.outputs[0].token_ids for item in items] == [[7], [8], [9]]
    assert [item.prompt_token_ids for item in items] == [[1, 2, 3]] * 3
    assert items[0].outputs[0].logprobs[0][7].logprob == -0.5 and not items[0].finished
    assert entry.prompt["prompt_token_ids"] == [1, 2, 3, 7]
    marker = decode_marker(native.transfer_of(entry.params)[MARKER])
    assert marker.num_prompt_tokens == 3 and marker.handoff == HANDOVER.frozen
    await asyncio.sleep(0)
    assert peers.calls == [(9, WorkerCall(WorkerOp.RELEASE, RequestId("p-1")))]
    assert requests.handoffs == {"first_token_used": 1}


def test_ranks_of_tokens_that_a_client_names_do_not_travel() -> None:
    """So a first token with them is computed again."""
    rows = [{7: Logprob(-0.1, rank=1), 30: Logprob(-9.0, rank=400)}]
    made = GenerateOutput(0, (7,), logprobs_of(rows, (7,)))
    [[*told]] = [native.OutputFace("r", [1]).make(made).outputs[0].logprobs or ()]
    assert [entry.rank for entry in told[0].values()] == [1, 2]


async def test_one_token_asked_for_needs_no_engine_here() -> None:
    handoffs, _, peers, _ = worker()
    items, _ = await read(handoffs, asked(HANDOVER, max_tokens=1), [])
    assert [(i.outputs[0].token_ids, i.outputs[0].finish_reason, i.finished) for i in items] == [([7], "length", True)]
    await asyncio.sleep(0)
    assert [call.op for _, call in peers.calls] == [WorkerOp.RELEASE]


async def test_a_first_token_that_is_computed_again_is_not_given_out() -> None:
    handoffs, requests, peers, _ = worker()
    params = asked(HANDOVER, max_tokens=5, min_tokens=2, seed=1)
    items, entry = await read(handoffs, params, [output_of([7]), output_of([8], "length")])
    assert [item.outputs[0].token_ids for item in items] == [[7], [8]]
    assert entry.prompt["prompt_token_ids"] == [1, 2, 3]
    assert decode_marker(native.transfer_of(entry.params)[MARKER]).handoff == HANDOVER.frozen
    assert requests.handoffs == {"first_token_min_tokens": 1}
    await asyncio.sleep(0)
    assert len(peers.calls) == 1


async def test_blocks_of_another_model_are_given_back_unread() -> None:
    handoffs, requests, peers, _ = worker()
    other = Handover(fingerprint="other", instance=9, frozen=HANDOVER.frozen)
    _, entry = await read(handoffs, asked(other), [output_of([7], "length")])
    assert native.transfer_of(entry.params) == {} and requests.handoffs == {"local_fingerprint": 1}
    await asyncio.sleep(0)
    assert len(peers.calls) == 1


@pytest.mark.parametrize(("theirs", "ours"), [("a", "b"), ("a", ""), ("", "a"), ("a", None), ("", None)])
async def test_blocks_of_another_adapter_are_given_back_unread(theirs: str, ours: str | None) -> None:
    handoffs, requests, peers, _ = worker()
    given = msgspec.structs.replace(HANDOVER, adapter=theirs)
    entry = handoffs.enter(RequestId("r"), {"prompt_token_ids": [1]}, asked(given), [1], given, ours)
    assert native.transfer_of(entry.params) == {} and requests.handoffs == {"local_adapter": 1}
    await asyncio.sleep(0)
    assert [call.op for _, call in peers.calls] == [WorkerOp.RELEASE]


async def test_what_a_request_with_an_adapter_lends_is_read_by_a_worker_with_the_same(tmp_path: Path) -> None:
    handoffs, requests, _, _ = worker()
    for name, weights in (("one", b"a"), ("two", b"a"), ("three", b"b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text('{"r": 8}')
        (tmp_path / name / "adapter_model.safetensors").write_bytes(weights)
    clients = {}
    for name in ("one", "two", "three"):
        clients[name] = llm = Llm()
        EngineClient(llm).serve(requests, handoffs)
        if name != "one":
            # Dynamo's prefill workers load none before its first request.
            await llm.add_lora(LoRARequest("sql", 1, str(tmp_path / name)))
    prompt, lora = {"prompt_token_ids": [1, 2, 3]}, LoRARequest("sql", 1, str(tmp_path / "one"))
    [made] = [item async for item in clients["one"].generate(prompt, asked(max_tokens=1), "r", lora_request=lora)]
    for name, used in (("two", "first_token_used"), ("three", "local_adapter")):
        requests.handoffs.clear()
        params = native.with_transfer(SamplingParams(max_tokens=5), made.kv_transfer_params)
        lora = LoRARequest("sql", 1, str(tmp_path / name))
        assert [item async for item in clients[name].generate(prompt, params, name, lora_request=lora)]
        assert requests.handoffs == {used: 1}
    await handoffs.release(RequestId("p-1"))


async def test_what_cannot_be_read_is_computed_here() -> None:
    handoffs, requests, _, _ = worker()
    params = native.with_transfer(SamplingParams(), {"do_remote_prefill": True, MARKER: {"m": "no"}})
    assert handoffs.read(params) is None and requests.handoffs == {"local_invalid_request": 1}


async def test_what_a_worker_without_this_package_has_computed_is_computed_here() -> None:
    handoffs, requests, _, _ = worker()
    params = native.with_transfer(SamplingParams(), {"do_remote_prefill": True, "remote_block_ids": [1, 2]})
    items, entry = await read(handoffs, params, [output_of([7], "length")])
    assert len(items) == 1 and native.transfer_of(entry.params) == {}
    assert requests.handoffs == {"local_not_lent": 1}


async def test_a_client_that_leaves_gives_the_blocks_back() -> None:
    handoffs, _, peers, _ = worker()
    params = asked(HANDOVER, max_tokens=5)
    entry = handoffs.enter(RequestId("r"), {"prompt_token_ids": [1, 2, 3]}, params, [1, 2, 3], HANDOVER)
    ended = False

    async def own() -> AsyncGenerator[RequestOutput, None]:
        nonlocal ended
        try:
            await asyncio.Event().wait()
            yield output_of([8])
        finally:
            ended = True

    stream = handoffs.stream(entry, own(), native.OutputFace("r", [1, 2, 3]), [1, 2, 3])
    assert (await anext(stream)).outputs[0].token_ids == [7]
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.wait((waiting,))
    await stream.aclose()
    await asyncio.sleep(0)
    assert ended and [call.op for _, call in peers.calls] == [WorkerOp.RELEASE]


async def test_a_prefill_worker_answers_for_a_request_that_runs_elsewhere() -> None:
    handoffs, _, _, _ = worker()
    answer = handoffs.known(RequestId("r"), [1, 2, 3], Owner(9, 77))
    assert answer.finished and answer.kv_transfer_params is not None
    assert answer.kv_transfer_params["do_remote_prefill"] is False
    params = native.with_transfer(SamplingParams(), answer.kv_transfer_params)
    given = handoffs.read(params)
    assert given is not None and given.owner == Owner(9, 77)
    assert handoffs.enter(RequestId("r"), {}, params, [1], given).handover is None


class Llm:
    """An ``AsyncLLM`` that gives one token."""

    def __init__(self, masks: bool = False, experts: bool = False) -> None:
        self.asked: list[SamplingParams] = []
        self.prompts: list[Any] = []
        model = SimpleNamespace(get_vocab_size=lambda: 1000, is_multimodal_model=False, return_sampling_mask=masks)
        self.vllm_config = SimpleNamespace(
            model_config=model,
            aux_output_config=SimpleNamespace(enabled=experts),
            lora_config=None,
            load_config=SimpleNamespace(load_format="auto"),
        )
        self.dead = asyncio.Event()

    async def check_health(self) -> None:
        if self.dead.is_set():
            raise EngineDeadError()

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **keywords: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        self.asked.append(sampling_params)
        self.prompts.append(prompt)
        item = output_of([7], "length")
        marker = native.transfer_of(sampling_params).get(MARKER)
        if marker is not None and decode_marker(marker).lend:
            item.kv_transfer_params = {"do_remote_prefill": True, MARKER: encode(Lent(frozen_of(prompt=3)))}
        yield item

    async def abort(self, request_id: str) -> None:
        pass

    async def add_lora(self, lora_request: Any) -> bool:
        return True

    async def remove_lora(self, lora_id: int) -> bool:
        return True

    async def collective_rpc(self, method: str, *args: Any) -> list[None]:
        return [None]

    async def sleep(self, level: int = 1, mode: str = "abort") -> None:
        pass

    async def pause_generation(self, *, mode: str = "abort") -> None:
        pass

    async def resume_generation(self) -> None:
        pass


async def test_a_prefill_worker_computes_what_is_new_and_nothing_that_has_an_owner() -> None:
    handoffs, requests, _, _ = worker()
    llm = Llm()
    EngineClient(llm).serve(requests, handoffs)
    prompt = {"prompt_token_ids": [1, 2, 3]}
    new = [item async for item in llm.generate(prompt, asked(max_tokens=1), "new")]
    assert unpack(new[-1].kv_transfer_params[MARKER], Handover).instance == 5  # type: ignore[index]
    assert len(llm.asked) == 1 and requests.legs == {}
    requests.owners.learn([(RequestId("moved"), Owner(9, 77))])
    moved = [item async for item in llm.generate(prompt, asked(max_tokens=1), "moved")]
    assert unpack(moved[-1].kv_transfer_params[MARKER], Handover).owner == Owner(9, 77)  # type: ignore[index]
    assert len(llm.asked) == 1 and handoffs.num_lent == 1
    await handoffs.release(RequestId("p-1"))


@pytest.mark.parametrize(
    ("prompt", "engine", "why"),
    [
        ({"prompt_token_ids": [1, 2]}, {}, ""),
        ({"prompt_token_ids": [1, 2], "multi_modal_data": {"image": object()}}, {}, "images"),
        ({"prompt_embeds": object()}, {}, "embeddings"),
        ({"prompt_token_ids": [1, 2]}, {"masks": True}, "sampling masks"),
        ({"prompt_token_ids": [1, 2]}, {"experts": True}, "routed experts"),
    ],
)
async def test_requests_reach_the_engine_as_dynamos_handler_gave_them(
    prompt: dict[str, Any], engine: dict[str, bool], why: str
) -> None:
    handoffs, requests, _, _ = worker()
    llm, params = Llm(**engine), SamplingParams(max_tokens=5)
    EngineClient(llm).serve(requests, handoffs)
    async for _ in llm.generate(prompt, params, "one"):
        assert why in requests.legs[RequestId("one")].fixed and bool(why) == bool(requests.legs[RequestId("one")].fixed)
    assert llm.prompts[0] is prompt and llm.asked[0] is params


async def test_a_request_with_images_can_move_once_its_tokens_are_known() -> None:
    handoffs, requests, _, _ = worker()
    llm = Llm()
    EngineClient(llm).serve(requests, handoffs)
    prompt = {"prompt_token_ids": [1, 2], "multi_modal_data": {"image": [Image.new("RGB", (2, 2))]}}
    stream = llm.generate(prompt, SamplingParams(max_tokens=5), "one")
    item = await anext(stream)
    leg = requests.legs[RequestId("one")]
    assert (leg.fixed, tuple(leg.prompt_token_ids)) == ("", tuple(item.prompt_token_ids)) and "images" in leg.attached
    assert native.decode(leg.native()).images is not None
    await stream.aclose()


async def test_an_unknown_token_never_reaches_the_engine() -> None:
    handoffs, requests, _, _ = worker()
    llm = Llm()
    EngineClient(llm).serve(requests, handoffs)
    with pytest.raises(VLLMValidationError, match="1000"):
        await anext(llm.generate({"prompt_token_ids": [1000]}, SamplingParams(), "one"))
    assert llm.asked == [] and not requests.legs


async def test_a_repeat_is_billed_for_the_prompt_and_not_for_the_answer_so_far() -> None:
    handoffs, requests, peers, _ = worker()
    llm = Llm()
    EngineClient(llm).serve(requests, handoffs)
    requests.owners.learn([(RequestId("moved"), Owner(9, 77, prompt_tokens=3))])
    peers.gives = [Attached((GenerateOutput(2, (8,), finish_reason=FinishReason.LENGTH),))]
    prompt = {"prompt_token_ids": [1, 2, 3, 6, 7]}
    items = [item async for item in llm.generate(prompt, SamplingParams(max_tokens=3), "moved")]
    assert [item.prompt_token_ids for item in items] == [[1, 2, 3]] and llm.asked == []


async def test_other_workers_know_what_was_in_flight_before_dynamo_learns_that_the_engine_is_dead() -> None:
    handoffs, requests, peers, _ = worker()

    class Dying(Llm):
        async def generate(self, *_: Any, **__: Any) -> AsyncGenerator[RequestOutput, None]:  # type: ignore[override]
            yield output_of([7])
            await self.dead.wait()
            raise EngineDeadError()

    llm = Dying()
    EngineClient(llm).serve(requests, handoffs)
    prompt = {"prompt_token_ids": [1, 2, 3]}
    streams = [llm.generate(prompt, SamplingParams(), name) for name in ("a", "b")]
    for stream in streams:
        await anext(stream)
    llm.dead.set()
    with pytest.raises(EngineDeadError):
        await llm.check_health()
    told = [(instance, call.op, call.suspects) for instance, call in peers.calls]
    assert told == [(1, WorkerOp.SUSPECTS, ("a", "b")), (2, WorkerOp.SUSPECTS, ("a", "b"))]
    for stream in streams:
        with pytest.raises(EngineDeadError):
            await anext(stream)
    assert len(peers.calls) == 2


async def test_a_request_that_was_in_two_engines_when_they_died_gets_an_error_and_no_engine() -> None:
    from dynamo.llm.exceptions import InvalidArgument

    handoffs, requests, _, _ = worker()
    llm = Llm()
    EngineClient(llm).serve(requests, handoffs)
    prompt = {"prompt_token_ids": [1, 2, 3]}
    requests.suspects.learn([RequestId("killer")])
    assert [item async for item in llm.generate(prompt, asked(max_tokens=1), "killer")]
    requests.suspects.learn([RequestId("killer")])
    for params in (asked(max_tokens=1), SamplingParams()):
        with pytest.raises(InvalidArgument, match="when 2 engines died"):
            await anext(llm.generate(prompt, params, "killer"))
    assert len(llm.asked) == 1
    await handoffs.release(RequestId("p-1"))


@pytest.mark.parametrize(
    ("params", "given", "why"),
    [
        ({}, HANDOVER, ""),
        ({"temperature": 0.0, "min_tokens": 5}, HANDOVER, ""),
        ({"min_tokens": 5}, HANDOVER, "min_tokens"),
        ({"n": 2}, HANDOVER, "samples"),
        ({"prompt_logprobs": 1}, HANDOVER, "prompt_logprobs"),
        ({"structured_outputs": StructuredOutputsParams(regex="a")}, HANDOVER, "guided"),
        ({}, Handover(frozen=HANDOVER.frozen, stops=True), "stop"),
        ({}, Handover(frozen=HANDOVER.frozen, captured=True), "captured"),
        ({"prompt_logprob_token_ids": [3]}, HANDOVER, "prompt_logprobs"),
        ({"logprob_token_ids": [3, 9]}, HANDOVER, "log_probabilities"),
        ({"logprobs": 1, "flat_logprobs": True}, HANDOVER, "log_probabilities"),
        ({"trace_decode_token_ids": [3]}, HANDOVER, "trace"),
    ],
)
def test_which_first_token_is_computed_again(params: dict[str, Any], given: Handover, why: str) -> None:
    assert why_not_first(SamplingParams(**params), [1, 2, 3], given) == why
