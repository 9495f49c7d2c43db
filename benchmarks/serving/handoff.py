# SPDX-License-Identifier: Apache-2.0
"""Workload ``handoff``: prompts that one worker computes and another one decodes, beside stock's NixlConnector.

Both systems have one prefill and one decode worker and run at the same time; each prompt is new, and goes to one
system and then, another one of the same length, to the other. The time of a transfer is what the decode worker's own
``vllm:nixl_xfer_time_seconds`` says, which both systems have. The first token of this package comes before its
transfer and stock's after it, so the time to the second token stands beside TTFT.
"""

from __future__ import annotations

import asyncio
import random
import re
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import msgspec
import numpy as np
import typer
from rich.console import Console

from benchmarks.graph import arguments_of, end_on_sigterm, machine, place
from benchmarks.serving.parts import Kind, Size
from benchmarks.serving.shapes import SHAPES
from benchmarks.serving.systems import System, resting, running
from benchmarks.serving.tables import table
from components.errors import MigrateError
from components.transfer import Transport

KINDS = (Kind.OURS, Kind.STOCK)
_TOKEN_IDS = (1000, 40000)
_LIMIT_S = 120.0
_SUMS = re.compile(r"^vllm:nixl_(xfer_time_seconds|bytes_transferred)_sum\{.*\} (\S+)$", re.MULTILINE)
_FIGURES = {
    "transfer": "transfer_s",
    "TTFT": "ttft_s",
    "second token": "second_s",
    "TPOT": "tpot_s",
}


class Answer(msgspec.Struct, frozen=True):
    """One request. Times in seconds from when it was sent."""

    system: str
    streams: int
    """Requests of this system at the same time."""
    ttft_s: float
    second_s: float
    tpot_s: float
    """From the second to the last chunk, for each further one: the gap before the second is in ``second_s``."""
    transfer_s: float
    """With several streams: mean of a round of them."""
    bytes: float


class Measured(msgspec.Struct):
    """Everything that was measured."""

    machine: dict[str, str]
    model: str
    date: str
    prompt: int
    output: int
    engine: dict[str, Any]
    answers: list[Answer] = []


async def _ask(session: aiohttp.ClientSession, system: System, prompt: list[int], output: int) -> list[float]:
    """Times of the answer's tokens, from when it was sent."""
    body = {"model": system.model, "prompt": prompt, "max_tokens": output, "ignore_eos": True, "stream": True}
    sent, times = time.monotonic(), []
    async with session.post(f"{system.url}/v1/completions", json=body | {"temperature": 0}) as reply:
        if reply.status != 200:
            raise MigrateError(f"{system.kind}: {reply.status}: {(await reply.text())[:300]}")
        async for line in reply.content:
            if line.startswith(b"data: {"):
                times.append(time.monotonic() - sent)
    if len(times) < 3:
        raise MigrateError(f"{system.kind}: {len(times)} chunks for {output} tokens")
    return times


async def _moved(session: aiohttp.ClientSession, system: System) -> dict[str, float]:
    (decode,) = (part for part in system.workers if part.role == "decode")
    async with session.get(f"http://127.0.0.1:{decode.environment['DYN_SYSTEM_PORT']}/metrics") as reply:
        return {name: float(value) for name, value in _SUMS.findall(await reply.text())}


async def _round(system: System, streams: int, prompt: int, output: int, seed: str) -> list[Answer]:
    chooser = random.Random(seed)
    prompts = [[chooser.randint(*_TOKEN_IDS) for _ in range(prompt)] for _ in range(streams)]
    timeout = aiohttp.ClientTimeout(total=_LIMIT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        before = await _moved(session, system)
        try:
            found = await asyncio.gather(*(_ask(session, system, each, output) for each in prompts))
        except (aiohttp.ClientError, TimeoutError) as error:
            raise MigrateError(f"{system.kind}: {error!r}") from error
        after = await _moved(session, system)
    took, size = (
        (after[name] - before.get(name, 0.0)) / streams if name in after else float("nan")
        for name in ("xfer_time_seconds", "bytes_transferred")
    )
    return [Answer(system.kind, streams, t[0], t[1], (t[-1] - t[1]) / max(1, len(t) - 2), took, size) for t in found]


def measure(
    found: Measured,
    streams: list[int],
    rounds: int,
    devices: tuple[int, ...],
    transport: Transport,
    logs: Path,
    say: Callable[[str], None],
    keep: Callable[[], None],
) -> None:
    """Add the answers of both systems. Raises ``MigrateError`` when one does not start or answer."""
    with ExitStack() as stack:
        where: dict[str, Any] = {"logs": logs, "engine": found.engine, "devices": devices, "size": Size(1, 1)}
        systems = [stack.enter_context(running(k, found.model, transport, **where, wait=False)) for k in KINDS]
        for system in systems:
            system.wait()
        for system in systems:
            for number in range(3):
                asyncio.run(_round(system, max(streams), found.prompt, found.output, f"warm {number}"))
        say("both systems are up and warm")
        for count in streams:
            for number in range(rounds):
                for system in systems if number % 2 == 0 else reversed(systems):
                    with resting(() if devices else [other for other in systems if other is not system]):
                        seed = f"{system.kind} {count} {number}"
                        found.answers += asyncio.run(_round(system, count, found.prompt, found.output, seed))
                keep()
            say("\n".join(lines(found, count)))


def lines(found: Measured, streams: int) -> list[str]:
    """A table of one number of streams."""
    both = [[each for each in found.answers if (each.system, each.streams) == (kind, streams)] for kind in KINDS]
    rows = []
    for title, field in _FIGURES.items():
        for share in (50, 99):
            ours, stock = (1e3 * float(np.percentile([getattr(each, field) for each in of], share)) for of in both)
            rows.append([f"{title} p{share}", f"{ours / stock:.2g}", f"{ours:.1f} ms", f"{stock:.1f} ms"])
    sizes = " and ".join(f"{np.median([each.bytes for each in of]) / 1e6:,.0f}" for of in both)
    return [
        f"{place(found.machine)}; {found.model}; {found.prompt} tokens of prompt, {found.output} of answer; "
        f"{streams} at a time; {len(both[0])} requests of each; {sizes} MB moved for each",
        "",
        *table(["figure", "ours / stock", "ours", "stock"], rows),
    ]


def section(found: Measured) -> list[str]:
    """Of the report; none without answers."""
    counts = sorted({each.streams for each in found.answers})
    title = [f"## Hand-offs of prompts: {found.model}", "", f"{found.date}."] if counts else []
    return [*title, *(line for count in counts for line in lines(found, count))]


def main(
    streams: Annotated[str, typer.Option(help="requests at the same time, joined by commas")] = "1,4",
    rounds: Annotated[int, typer.Option(min=1, help="of each number of streams")] = 20,
    prompt: Annotated[int, typer.Option(min=1, help="tokens; 8,192 of llama-3.1-8b are 1 GiB of KV")] = 1024,
    output: Annotated[int, typer.Option(min=4, help="tokens of each answer")] = 64,
    model: Annotated[str, typer.Option(help="as in configs/disagg.yaml, or llama-3.1-8b")] = "tiny-llama",
    devices: Annotated[str, typer.Option(help="GPUs that workers take in turn, joined by commas; empty: CPU")] = "",
    engine_args: Annotated[str, typer.Option(help="vLLM's arguments for all workers, as JSON")] = "{}",
    transport: Annotated[Transport, typer.Option("--nixl-transport")] = Transport.AUTO,
    path: Annotated[Path, typer.Option("--json", help="file for the raw samples")] = Path("handoff.json"),
    logs: Annotated[Path | None, typer.Option(help="folder to keep all logs in")] = None,
) -> None:
    """Measure hand-offs of prompts, beside stock Dynamo with NixlConnector."""
    end_on_sigterm()
    engine = arguments_of(engine_args)
    if model in SHAPES:
        engine = {"load-format": "dummy"} | engine
    found = Measured(machine(), model, time.strftime("%Y-%m-%d"), prompt, output, engine)
    console = Console(soft_wrap=True, markup=False, highlight=False)
    gpus = tuple(int(word) for word in devices.split(",") if word)
    with tempfile.TemporaryDirectory(prefix="dynamo-migrate-bench-") as scratch:
        counts = [int(word) for word in streams.split(",")]
        measure(
            found,
            counts,
            rounds,
            gpus,
            transport,
            logs or Path(scratch),
            console.print,
            lambda: path.write_bytes(msgspec.json.encode(found)) and None,
        )


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
