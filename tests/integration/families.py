# SPDX-License-Identifier: Apache-2.0
"""Moved answers of each family of models beside unmoved ones.

    python -m tests.integration.families      (writes benchmarks/results/families-equal-cpu.json)

Two engines of a small random model. Each request is answered without a move, and then with three moves to and fro in
each mode. Every second one begins apart: one engine prefills it, the other decodes. What has been counted is written
after each model; other models' counts in the file stay.

On CPUs vLLM's prefill of compressed heads and of states does not agree with its decoding to the last bit, so a replay,
which computes tokens again that were decoded, is not what an unmoved request gives. Where it differs, a greedy one is
compared with what an engine gives that gets the same tokens as a prompt.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from benchmarks.graph import end_on_sigterm, machine
from benchmarks.migration.equal import MODES, NO_REPLAY, RESULTS, Cell, Counts
from benchmarks.models import resolve
from components import process
from components.engine.kv import RequestId
from components.engine.protocol import FinishReason, GenerateOutput, GenerateRequest, Sampling
from components.engine.vllm.compat.runners import runner_version
from components.engine.vllm.control import MARKER, Marker, decode_lent, encode
from components.engine.vllm.engine import VLLMEngine
from components.errors import MigrateError
from components.serve.servers import Servers
from tests.integration.moves import Client, move, request_of, run, take_until
from tests.integration.vllm_engines import Pair, start_pair
from tests.pillow import sitecustomize

__all__ = ["sitecustomize"]

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model": "tiny-llama"},
    "gemma3": {"model": "tiny-gemma3", "num_gpu_blocks_override": 900},
    "gpt-oss": {"model": "tiny-gpt-oss", "num_gpu_blocks_override": 450},
    "deepseek-v3": {"model": "tiny-deepseek-v3", "num_gpu_blocks_override": 600, "block_size": 16},
    "qwen3-next": {"model": "tiny-qwen3-next", "num_gpu_blocks_override": 100},
    "paddleocr-vl": {"model": "tiny-paddleocr-vl", "limit_mm_per_prompt": {"image": 0}},
    "int8, FP8 KV": {"model": "tiny-llama-int8", "kv_cache_dtype": "fp8"},
}
"""With arguments of vLLM's engine."""
SAMPLINGS = {
    "greedy": Sampling(temperature=0.0, max_tokens=180, ignore_eos=True),
    "seeded": Sampling(temperature=0.9, top_p=0.95, seed=7, max_tokens=180, ignore_eos=True),
    "penalties": Sampling(
        temperature=0.8, seed=11, presence_penalty=0.9, repetition_penalty=1.2, max_tokens=180, ignore_eos=True
    ),
}
PROMPTS = (5, 31, 64, 97, 300, 700, 990)


class Moved(msgspec.Struct):
    """An answer, and the engine and the number of tokens of each move."""

    client: Client
    moves: list[tuple[VLLMEngine, int]] = []


async def moved(pair: Pair, request: GenerateRequest, mode: str, apart: bool, number: int) -> Moved:
    """One request's answer, with three moves."""
    source, target = (pair.b, pair.a) if apart else (pair.a, pair.b)
    if apart:
        client, stream = await taken_over(pair, request)
    else:
        client, stream = Client(), source.generate(request)
    answer = Moved(client)
    # The rest is long enough for the last move on a busy machine: a live one takes some steps.
    for stop in (6 + number % 7, 20 + number % 13, 34 + number % 17):
        await take_until(stream, client, stop)
        stream = await move(source, target, request, client, stream, live=mode == "live", replay=mode == "replay")
        answer.moves.append((target, len(client.tokens)))
        source, target = target, source
    async for output in stream:
        client.take(output)
    return answer


async def taken_over(pair: Pair, request: GenerateRequest) -> tuple[Client, Any]:
    """A request that one engine prefills and the other one decodes: its first tokens, and the stream of the others."""

    def params(marker: Marker, **more: Any) -> Any:
        sampling = msgspec.structs.asdict(request.sampling)
        chosen = ("temperature", "top_p", "seed", "presence_penalty", "repetition_penalty", "max_tokens")
        given = {key: sampling[key] for key in chosen} | {"ignore_eos": True, "output_kind": RequestOutputKind.DELTA}
        return SamplingParams(extra_args={"kv_transfer_params": {MARKER: encode(marker)}}, **(given | more))

    name, tokens = request.request_id, list(request.prompt_token_ids)
    prefill = pair.a.llm.generate({"prompt_token_ids": tokens}, params(Marker(name, lend=True), max_tokens=1), name)
    [*_, item] = [output async for output in prefill]
    lent = decode_lent(item.kv_transfer_params[MARKER])
    first = list(lent.frozen.output_token_ids)
    taking = params(Marker(name, num_prompt_tokens=len(tokens), handoff=lent.frozen))
    stream = decoded(pair.b, tokens + first, taking, name, len(first))
    client = Client(list(first))
    client.take(await anext(stream))
    await pair.a.free_lent(lent.frozen.offer.request_id)
    return client, stream


async def decoded(
    engine: VLLMEngine, prompt: list[int], params: Any, name: str, made: int
) -> AsyncIterator[GenerateOutput]:
    """What a decode engine gives, behind the tokens that were made elsewhere."""
    async for item in engine.llm.generate({"prompt_token_ids": prompt}, params, name):
        tokens, reason = tuple(item.outputs[0].token_ids), None
        if item.finished:
            aborted = item.outputs[0].finish_reason == "abort"
            reason = FinishReason.FROZEN if aborted else FinishReason.LENGTH
        yield GenerateOutput(made, () if reason is FinishReason.FROZEN else tokens, finish_reason=reason)
        made += len(tokens)


async def as_vllm(request: GenerateRequest, answer: Moved) -> bool:
    """Whether vLLM, given the tokens before each move as a prompt, goes on as the moved request did."""
    tokens = answer.client.tokens
    ends = [made for _, made in answer.moves[1:]] + [len(tokens)]
    for number, ((engine, made), end) in enumerate(zip(answer.moves, ends, strict=True)):
        rest = msgspec.structs.replace(request.sampling, max_tokens=end - made)
        prompt = (*request.prompt_token_ids, *tokens[:made])
        stock = await run(engine, GenerateRequest(RequestId(f"{request.request_id}-{number}"), prompt, rest))
        if stock.tokens != tokens[made:end]:
            return False
    return True


async def compare(
    pair: Pair,
    family: str,
    requests: int,
    tokens: int = 100,
    prompts: Sequence[int] = PROMPTS,
    kinds: Sequence[str] = tuple(SAMPLINGS),
    first: int = 0,
) -> list[Cell]:
    """Counts of so many requests, each of which moves in each mode. ``first``: number of the first one."""
    config = pair.a.llm.vllm_config
    caching, runner = bool(config.cache_config.enable_prefix_caching), runner_version(config)
    cells: dict[tuple[bool, str, str], Cell] = {}
    for number in range(first, first + requests):
        kind = kinds[number % len(kinds)]
        sampling = msgspec.structs.replace(SAMPLINGS[kind], max_tokens=tokens)
        asked = request_of(f"plain-{number}", prompts[number % len(prompts)] + number // len(prompts), sampling)
        plain, apart = await run(pair.a, asked), number % 2 == 1
        for mode in MODES:
            request = msgspec.structs.replace(asked, request_id=RequestId(f"{mode}-{number}"))
            answer = await moved(pair, request, mode, apart, number)
            cell = cells.setdefault((apart, mode, kind), Cell(family, caching, apart, mode, kind, runner))
            cell.answers += 1
            if answer.client.tokens == plain.tokens:
                cell.equal += 1
            else:
                cell.as_vllm += mode == "replay" and kind == "greedy" and await as_vllm(request, answer)
    return list(cells.values())


def wrong(cells: list[Cell]) -> Iterator[Cell]:
    """Those with answers that are not as they should be. Sampled replays of some families have nothing to be like."""
    for cell in cells:
        rounded = cell.family in NO_REPLAY and cell.mode == "replay"
        if rounded and cell.kind == "greedy":
            if cell.equal + cell.as_vllm != cell.answers:
                yield cell
        elif not rounded and cell.equal != cell.answers:
            yield cell


async def _count(family: str, caching: bool, *how: Any) -> list[Cell]:
    more = FAMILIES[family] | {"enable_prefix_caching": caching}
    servers = Servers()
    try:
        url = servers.start(os.environ)["ETCD_ENDPOINTS"]
        pair = await start_pair(resolve(more.pop("model")), url, **more)
        try:
            return await compare(pair, family, *how)
        finally:
            await pair.stop()
    finally:
        servers.stop()


def main(
    families: Annotated[str, typer.Option(help="their names, divided by semicolons")] = ";".join(FAMILIES),
    caching: Annotated[str, typer.Option(help="on, off or on,off")] = "on,off",
    requests: Annotated[int, typer.Option(min=1, help="of each model; each moves in each mode")] = 17,
    tokens: Annotated[int, typer.Option(min=50, help="of each answer")] = 100,
    prompts: Annotated[str, typer.Option(help="their tokens, joined by commas")] = ",".join(map(str, PROMPTS)),
    kinds: Annotated[str, typer.Option(help="of sampling, joined by commas")] = ",".join(SAMPLINGS),
    first: Annotated[int, typer.Option(min=0, help="so many have been counted; the others' counts are added")] = 0,
    json: Annotated[Path, typer.Option("--json", help="file for the counts")] = RESULTS / "families-equal-cpu.json",
) -> None:
    """Count moved answers that equal unmoved ones."""
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    for family in families.split(";"):
        for each in caching.split(","):
            lengths = tuple(int(length) for length in prompts.split(","))
            cells = asyncio.run(_count(family, each == "on", requests, tokens, lengths, kinds.split(","), first))
            for cell in cells:
                typer.echo(str(cell))
            _write(json, cells, add=first > 0)
            if found := list(wrong(cells)):
                raise MigrateError(f"these answers differ from unmoved ones: {found}")


def _kind(cell: Cell) -> tuple[object, ...]:
    """What it counts."""
    return cell.family, cell.caching, cell.apart, cell.mode, cell.kind, cell.runner


def _write(file: Path, cells: list[Cell], add: bool) -> None:
    kept = msgspec.json.decode(file.read_bytes(), type=Counts).cells if file.exists() else []
    if add:
        before = {_kind(cell): cell for cell in kept}
        for cell in cells:
            if found := before.get(_kind(cell)):
                cell.answers += found.answers
                cell.equal += found.equal
                cell.as_vllm += found.as_vllm
    new = {_kind(cell) for cell in cells}
    same = (cells[0].family, cells[0].caching)
    kept = [cell for cell in kept if _kind(cell) not in new and (add or (cell.family, cell.caching) != same)]
    file.write_bytes(msgspec.json.format(msgspec.json.encode(Counts(machine(), kept + cells))))


if __name__ == "__main__":
    end_on_sigterm()
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    process.run_blocking(app)
