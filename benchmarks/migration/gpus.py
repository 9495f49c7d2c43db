# SPDX-License-Identifier: Apache-2.0
"""Live migration between two GPUs: ``python -m benchmarks.migration.gpus --devices cuda:0,cuda:1 --json out.json``

Two processes with an engine each: paged KV in Llama-3-70B's size (80 layers, 4 KiB a token and layer), no weights; a
step reads all KV of the request on its GPU. The driver takes the place of the router and calls the engine protocol in
the order of ``components/migration/move.py``. Every request's tokens are compared with those of one that stayed.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.graph import machine
from benchmarks.migration.remote import Remote, target
from benchmarks.transfer.nvlink import topology
from components.engine.paged import PagedEngine, PagedOptions
from components.engine.protocol import GenerateOutput, GenerateRequest, RequestId, Sampling
from components.migration.messages import Mode

_OUTPUTS = 96
_BEFORE = 16
"""Tokens before the move begins."""
_ROUNDS = 4
_STEP_S = 0.02
"""Added to each step, in the place of the model's weights."""
_LANES = {"auto": {}, "nixl": {"backends": ("nixl",)}}


class Move(msgspec.Struct):
    """One migration. Seconds."""

    lane: str
    mode: Mode
    prompt: int
    downtime_s: float
    """From the source's last token to the target's first."""
    step_s: float
    """Median gap between tokens away from the move."""
    copying_s: float
    """The longest gap while blocks were being copied and the source went on."""
    bytes: int
    rounds: int
    equal: bool


class Report(msgspec.Struct):
    """Raw samples and where they come from."""

    machine: dict[str, str]
    devices: str
    topology: str
    moves: list[Move]


@dataclass
class Stream:
    """Tokens of one request and when they came."""

    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def add(self, output: GenerateOutput) -> None:
        """Note what came."""
        self.tokens += output.token_ids
        self.times += [time.monotonic()] * len(output.token_ids)


def options(device: str, name: str, longest: int, lane: str) -> PagedOptions:
    """Both engines' sizes."""
    blocks = 2 * (longest + _OUTPUTS) // 16 + 8
    agent = {"name": name, "namespace": "gpus"} | _LANES[lane]
    return PagedOptions(
        agent,
        device=device,
        num_blocks=blocks,
        max_model_len=longest + _OUTPUTS,
        layers=80,
        words=512,
        step_s=_STEP_S,
        prefix_caching=False,
    )


def request(prompt: int, number: int) -> GenerateRequest:
    """The same tokens for each number: only the id differs."""
    tokens = tuple(1 + (7 * i) % 997 for i in range(prompt))
    sampling = Sampling(max_tokens=_OUTPUTS, temperature=0.0, ignore_eos=True)
    return GenerateRequest(RequestId(f"{prompt}-{number}"), tokens, sampling)


async def _read(engine: PagedEngine, origin: GenerateRequest, stream: Stream) -> None:
    async for output in engine.generate(origin):
        stream.add(output)


async def _landed(there: Remote, origin: GenerateRequest) -> Any:
    while True:
        status = await there.landing_status(origin.request_id)
        if status is not None and status.reserved and not status.in_flight:
            if status.error:
                raise RuntimeError(status.error[1])
            return status
        await asyncio.sleep(0.001)


async def move(here: PagedEngine, there: Remote, origin: GenerateRequest, mode: Mode) -> tuple[Stream, dict[str, Any]]:
    """Run the request, move it after some tokens, run it to its end."""
    stream = Stream()
    reading = asyncio.ensure_future(_read(here, origin, stream))
    while len(stream.tokens) < _BEFORE:
        await asyncio.sleep(0.001)
    begun, landing = time.monotonic(), None
    if mode is Mode.LIVE:
        for number in range(_ROUNDS):
            offer = await here.offer(origin.request_id)
            tokens = tuple(stream.tokens)
            count = min(offer.num_tokens, len(origin.prompt_token_ids) + len(tokens) - 1) // offer.block_size
            offer = msgspec.structs.replace(
                offer, block_ids=offer.block_ids[:count], num_tokens=count * offer.block_size
            )
            if number == 0:
                await there.generate(msgspec.structs.replace(origin, output_token_ids=tokens, landing=offer))
            elif offer.num_tokens - landing.landed_tokens <= 2 * offer.block_size:
                break
            else:
                await there.extend(origin.request_id, offer, tokens)
            landing = await _landed(there, origin)
    frozen = await here.freeze(origin.request_id)
    if landing is None:
        await there.generate(
            msgspec.structs.replace(origin, output_token_ids=frozen.output_token_ids, landing=frozen.offer)
        )
        await _landed(there, origin)
    await there.commit(origin.request_id, frozen)
    outputs = there.outputs(origin.request_id)
    first = await outputs.get()
    downtime = time.monotonic() - stream.times[-1]
    gaps = np.diff(stream.times)
    during = [gap for gap, end in zip(gaps, stream.times[1:], strict=True) if end > begun]
    figures = {
        "downtime_s": downtime,
        "step_s": float(np.median(gaps)),
        "copying_s": float(max(during, default=0.0)),
    }
    await here.release(origin.request_id)
    await reading
    stream.add(first)
    status = await there.landing_status(origin.request_id)
    while first.finish_reason is None:
        first = await outputs.get()
        stream.add(first)
    return stream, figures | {"bytes": status.bytes, "rounds": status.rounds, "lane": status.lane}


async def _measure(devices: list[str], prompts: list[int], repeats: int, lane: str, report: Report) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, options(devices[1], "target", max(prompts), lane)))
    process.start()
    here = PagedEngine(options(devices[0], "source", max(prompts), lane))
    there = Remote(ours)
    try:
        await here.start()
        await there.meet(here)
        for prompt in prompts:
            stayed = Stream()
            await _read(here, request(prompt, -1), stayed)
            for mode in (Mode.LIVE, Mode.STOP_AND_COPY):
                for number in range(repeats + 1):
                    origin = request(prompt, 1000 * len(report.moves) + number)
                    stream, figures = await move(here, there, origin, mode)
                    if number:
                        equal = stream.tokens == stayed.tokens
                        report.moves.append(Move(mode=mode, prompt=prompt, equal=equal, **figures))
    finally:
        await there.stop()
        await here.stop()
        process.join(10)
        process.kill()


def show(report: Report) -> None:
    """One line for each lane, mode and prompt; the ratio to stop-and-copy first."""
    table = Table(title=f"{report.devices}, {report.machine.get('gpu', report.machine['cpu'])}")
    columns = ("stop-and-copy / mode", "prompt", "lane", "mode", "n", "downtime p50 ms", "max", "step ms")
    for column in (*columns, "longest step while copying ms", "MB", "rounds", "tokens equal"):
        table.add_column(column, justify="right")
    keys = dict.fromkeys((m.prompt, m.lane, m.mode) for m in report.moves)
    for prompt, lane, mode in keys:
        found = [m for m in report.moves if (m.prompt, m.lane, m.mode) == (prompt, lane, mode)]
        plain = [m for m in report.moves if (m.prompt, m.lane, m.mode) == (prompt, lane, Mode.STOP_AND_COPY)]
        downtime = float(np.median([m.downtime_s for m in found]))
        table.add_row(
            f"{float(np.median([m.downtime_s for m in plain])) / downtime:.1f}" if plain else "-",
            *(str(prompt), lane, mode, str(len(found)), f"{1e3 * downtime:.1f}"),
            f"{1e3 * max(m.downtime_s for m in found):.1f}",
            f"{1e3 * float(np.median([m.step_s for m in found])):.1f}",
            f"{1e3 * max(m.copying_s for m in found):.1f}",
            f"{np.median([m.bytes for m in found]) / 1e6:.0f}",
            f"{np.median([m.rounds for m in found]):.0f}",
            f"{sum(m.equal for m in found)} of {len(found)}",
        )
    Console().print(table)


def main(
    devices: Annotated[str, typer.Option(help="of source and target")] = "cuda:0,cuda:1",
    prompts: Annotated[str, typer.Option(help="lengths in tokens")] = "1024,3040",
    repeats: Annotated[int, typer.Option(help="moves for each case")] = 4,
    lanes: Annotated[str, typer.Option(help=f"of {', '.join(_LANES)}")] = "auto,nixl",
    json: Annotated[Path | None, typer.Option("--json", help="file for the raw samples")] = None,
) -> None:
    """Downtime of one request that moves between two GPUs while it decodes."""
    ends = [device.strip() for device in devices.split(",")]
    report = Report(machine(), devices, topology(), [])
    if ends[0].startswith("cuda"):
        import torch

        report.machine["gpu"] = torch.cuda.get_device_name(ends[0])
    for lane in lanes.split(","):
        asyncio.run(_measure(ends, [int(p) for p in prompts.split(",")], repeats, lane, report))
    show(report)
    if json is not None:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    os._exit(0 if all(m.equal for m in report.moves) else 1)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
