# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.migration.drain``: SIGTERM to a decode worker with 16 running requests.

The same with this package and with stock Dynamo, with and without its token replay: 32 streams over two decode workers,
continuous new requests, greedy in float32, prefix caching off. A request has failed when its stream ends without a
finish reason; it is cut off when it ends early with one; it has changed when its text otherwise differs from the
remaining worker's answer on an idle system (on GPUs, in bfloat16, a text also depends on the batch).
"""

from __future__ import annotations

import asyncio
import json as jsonlib
import os
import time
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import msgspec
import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from benchmarks.graph import arguments_of, end_on_sigterm, machine
from benchmarks.migration.measure import Prompts, Watched
from benchmarks.serving import shapes
from benchmarks.serving.parts import Kind
from benchmarks.serving.systems import System, running
from components.errors import MigrateError
from components.transfer import Transport

_SYSTEMS = (Kind.OURS, Kind.STOCK, Kind.STOCK_RETRY)
_BEFORE = 8
"""Tokens of every request before SIGTERM."""
_NEW_EVERY_S = 1.0


class Outcome(msgspec.Struct, frozen=True):
    """What the clients of one system saw. Times in seconds."""

    system: str
    requests: int
    failed: int
    cut_off: int
    changed: int
    longest_gaps: tuple[float, ...]
    """The longest gap between two tokens after the signal, for each request."""
    undisturbed_gap: float
    """Median gap before the signal."""
    leaving_s: float
    """From the signal to the end of the process."""
    later: int
    """Requests sent after the signal."""
    later_failed: int
    errors: tuple[str, ...]


class Stream(Watched):
    """For hundreds of streams at once: counts chunks while they arrive, and parses them at the end."""

    async def run(self, http: aiohttp.ClientSession, body: dict[str, Any]) -> None:  # type: ignore[override]
        """See ``Watched``."""
        whole = bytearray()
        try:
            async with http.post("/v1/completions", json=body | {"stream": True}) as reply:
                if reply.status != 200:
                    raise MigrateError(f"HTTP {reply.status}: {(await reply.text())[:500]}")
                async for line in reply.content:
                    if line.startswith(b"data: {"):
                        self.times.append(time.time())
                        whole += line
        finally:
            for line in whole.splitlines():
                event = jsonlib.loads(line[6:])
                if error := event.get("error"):
                    raise MigrateError(str(error))
                for choice in event.get("choices") or []:
                    self.text += choice.get("text") or ""
                    self.ended = choice.get("finish_reason") in ("length", "stop")


class Drains(msgspec.Struct):
    """Raw samples, machine and model."""

    machine: dict[str, str]
    model: str
    outcomes: list[Outcome]


async def _drain(system: System, prompts: Prompts, count: int, prompt: int, output: int) -> Outcome:
    bodies = [prompts.body(prompt + 8 * (number % 9), output) for number in range(count)]
    part = [part for part in system.parts if part.role == "decode"][-1]
    timeout, connector = aiohttp.ClientTimeout(total=300), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(system.url, timeout=timeout, connector=connector) as http:
        streams = await start(http, bodies)
        while not all(len(s.times) >= _BEFORE or (s.task is not None and s.task.done()) for s in streams):
            await asyncio.sleep(0.05)
        told = max(s.times[-1] for s in streams if s.times)
        ending = asyncio.ensure_future(asyncio.to_thread(system.terminate, part))
        later: list[Stream] = []
        while not ending.done() or not all(s.task is not None and s.task.done() for s in streams):
            if not ending.done():
                later += await start(http, [prompts.body(48, 8)])
            await asyncio.sleep(_NEW_EVERY_S)
        errors = await _finish([*streams, *later])
        peace = await start(http, bodies)
        await _finish(peace)
    ended = [(one, other) for one, other in zip(streams, peace, strict=True) if one.ended]
    whole = [(one, other) for one, other in ended if one.text == other.text or not other.text.startswith(one.text)]
    return Outcome(
        system=system.kind.value,
        requests=count,
        failed=count - len(ended),
        cut_off=len(ended) - len(whole),
        changed=sum(one.text != other.text for one, other in whole),
        longest_gaps=tuple(max(one.gaps([(told, told + 1e6)]), default=0.0) for one, _ in whole),
        undisturbed_gap=float(np.median([gap for s in streams for gap in s.gaps([(0.0, told)])])),
        leaving_s=ending.result(),
        later=len(later),
        later_failed=sum(not s.ended for s in later),
        errors=tuple(sorted(set(errors))),
    )


async def start(http: aiohttp.ClientSession, bodies: list[dict[str, Any]]) -> list[Stream]:
    streams = [Stream() for _ in bodies]
    for watched, body in zip(streams, bodies, strict=True):
        watched.task = asyncio.ensure_future(watched.run(http, body))
    return streams


async def _finish(streams: list[Stream]) -> list[str]:
    results = await asyncio.gather(*(s.task for s in streams if s.task is not None), return_exceptions=True)
    return [f"{type(r).__name__}: {r}" for r in results if isinstance(r, BaseException)]


def show(drains: Drains, console: Console) -> None:
    """One line for each system."""
    table = Table(title=f"{drains.model}, {drains.machine['cpu']}: SIGTERM to one of two decode workers")
    for column in ("system", "failed", "cut off", "changed", "gap p50 ms", "max", "before", "leaving s", "new failed"):
        table.add_column(column, justify="right")
    for one in drains.outcomes:
        gaps = [1e3 * gap for gap in one.longest_gaps] or [float("nan")]
        table.add_row(
            one.system,
            f"{one.failed} of {one.requests}",
            str(one.cut_off),
            str(one.changed),
            f"{np.median(gaps):.0f}",
            f"{max(gaps):.0f}",
            f"{1e3 * one.undisturbed_gap:.0f}",
            f"{one.leaving_s:.1f}",
            f"{one.later_failed} of {one.later}",
        )
    console.print(table)
    console.print(
        "gap: the longest between two tokens of each request after the signal; before: the median, undisturbed"
    )
    for one in drains.outcomes:
        for error in one.errors:
            console.print(f"{one.system}: {error}")


def main(
    model: Annotated[str, typer.Option(help="as in configs/disagg.yaml")] = "smollm2",
    requests: Annotated[int, typer.Option(help="streams, half of them on the worker that leaves")] = 32,
    prompt: Annotated[int, typer.Option(help="fewest tokens of a prompt")] = 48,
    output: Annotated[int, typer.Option(help="tokens of each answer")] = 200,
    systems: Annotated[str, typer.Option(help=f"of {', '.join(_SYSTEMS)}")] = ",".join(_SYSTEMS),
    json: Annotated[Path, typer.Option("--json", help="file for the raw samples")] = Path(
        "benchmarks/results/drain-cpu.json"
    ),
    devices: Annotated[str, typer.Option(help="GPUs of prefill and both decode workers, for example 0,0,1")] = "",
    engine_args: Annotated[str, typer.Option(help="vLLM's arguments for all workers, as JSON")] = "{}",
    logs: Annotated[Path | None, typer.Option(help="folder to keep all logs in")] = None,
) -> None:
    """Lost, changed and stalled requests when a decode worker leaves, beside stock Dynamo."""
    end_on_sigterm()
    drains = Drains(machine(), model, [])
    prompts = Prompts(model, AutoTokenizer.from_pretrained(shapes.folder(model)))
    gpus = tuple(int(word) for word in devices.split(",") if word)
    length = max(2048, prompt + 72 + output)
    engine = {"max-model-len": length, "max-num-seqs": requests + 8, "enable-prefix-caching": False}
    engine |= {"load-format": "dummy"} if model in shapes.SHAPES else {}
    engine |= ({} if gpus else {"dtype": "float32"}) | arguments_of(engine_args)
    for word in systems.split(","):
        with running(Kind(word.strip()), model, Transport.AUTO, logs, engine=engine, devices=gpus) as system:
            drains.outcomes.append(asyncio.run(_drain(system, prompts, requests, prompt, output)))
        json.write_bytes(msgspec.json.format(msgspec.json.encode(drains)))
    show(drains, Console())
    os._exit(0)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
