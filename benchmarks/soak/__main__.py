# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.soak --minutes 30``: exit code 0 only without errors, changed tokens, leaks and growth."""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import typer
from rich.console import Console

from benchmarks.graph import end_on_sigterm, machine
from benchmarks.serving.load import Control
from benchmarks.serving.parts import Kind, Part, Size
from benchmarks.serving.systems import System, running
from benchmarks.soak.memory import Memory, plot
from benchmarks.soak.report import Report
from benchmarks.soak.traffic import Traffic, bodies
from components.transfer import Transport

_STEP_S = 0.02
"""Of the engine without a model, which would otherwise be done before anything can be moved."""
_SIZE = Size(2, 2)
"""Without any prefill worker Dynamo's frontend answers with 503: one stays while the other is restarted."""
_IDLE_S = 60.0
"""How long workers may take to be empty after the last request."""


class Soak:
    """One soak of a running system."""

    def __init__(self, system: System, report: Report, traffic: Traffic, console: Console) -> None:
        self._system = system
        self._report = report
        self._traffic = traffic
        self._console = console
        self._control = Control(system)
        self._memory = Memory(system)
        self._began = time.monotonic()
        self._busy: set[str] = set()

    def _now(self) -> float:
        return time.monotonic() - self._began

    async def run(self, at_once: int, every_s: float, restart_s: float) -> None:
        """Load, migrations, restarts and a look at the memory, side by side, then the count of what is left."""
        stop = asyncio.Event()
        await self._traffic.learn()
        self._began = time.monotonic()
        jobs = [
            asyncio.ensure_future(self._traffic.run(at_once, stop)),
            asyncio.ensure_future(self._migrate(every_s, stop)),
            asyncio.ensure_future(self._restart(restart_s, stop)),
            asyncio.ensure_future(self._watch(stop)),
        ]
        await asyncio.wait(jobs, timeout=60 * self._report.minutes, return_when=asyncio.FIRST_EXCEPTION)
        stop.set()
        await asyncio.gather(*jobs)
        await self._count()
        self._control.__exit__(None, None, None)
        self._report.lives = list(self._memory.lives.values())
        self._report.grown = [
            f"{life.name} (pid {life.pid}) grew by {life.growth_mib():.1f} MiB"
            for life in self._report.lives
            if not life.is_flat()
        ]

    async def _migrate(self, every_s: float, stop: asyncio.Event) -> None:
        chooser = random.Random(1)
        while not stop.is_set():
            await asyncio.sleep(every_s)
            status = await asyncio.to_thread(self._control.status)
            decode = [w.worker for w in status.workers if w.role in ("decode", "agg") and not w.cordoned and w.stats]
            running = [
                (worker.worker, row)
                for worker, row in status.requests()
                if worker.worker in decode and row.output_tokens > 1 and not row.moving
            ]
            if not running or len(decode) < 2:
                continue
            source, row = chooser.choice(running)
            target = chooser.choice([worker for worker in decode if worker != source])
            record = await asyncio.to_thread(self._control.migrate, row.request_id, target)
            if record is not None and record.ok:
                self._report.moves += 1
            else:
                reason = record.code if record is not None else "the request has ended"
                self._report.not_made[reason] = self._report.not_made.get(reason, 0) + 1

    async def _restart(self, every_s: float, stop: asyncio.Event) -> None:
        turn = 0
        while not stop.is_set():
            end = self._now() + every_s
            while self._now() < end and not stop.is_set():
                await asyncio.sleep(0.5)
            if stop.is_set():
                return
            part = self._system.workers[turn % len(self._system.workers)]
            turn += 1
            self._report.restarts_s.append(round(self._now(), 1))
            await asyncio.to_thread(self._again, part)
            self._console.print(f"{self._now() / 60:5.1f} min: {part.name} has been restarted")

    def _again(self, part: Part) -> None:
        self._system.terminate(part)
        self._system.start(part)
        self._system.wait_ready([part])

    async def _watch(self, stop: asyncio.Event) -> None:
        shown = 0.0
        while not stop.is_set():
            self._memory.sample(self._now())
            if self._now() - shown > 60:
                shown = self._now()
                tally = self._traffic.tally
                self._console.print(
                    f"{shown / 60:5.1f} min: {tally.finished} requests, {self._report.moves} moves, "
                    f"{len(tally.errors)} errors, {len(tally.changed)} changed"
                )
            await asyncio.sleep(2.0)

    async def _count(self) -> None:
        """Blocks and requests that somebody still holds although nobody asks for anything any more."""
        end = self._now() + _IDLE_S
        while True:
            status = await asyncio.to_thread(self._control.status)
            leaks = []
            for worker in status.workers:
                stats = worker.stats
                if stats is None:
                    leaks.append(f"worker {worker.worker} does not report")
                elif stats.free_blocks != stats.total_blocks or stats.frozen or stats.landing or worker.requests:
                    held = stats.total_blocks - stats.free_blocks
                    leaks.append(f"worker {worker.worker}: {held} blocks, {len(worker.requests)} requests")
            if not leaks or self._now() > end:
                self._report.leaks = leaks
                return
            await asyncio.sleep(1.0)


def main(
    minutes: Annotated[float, typer.Option(help="length")] = 30.0,
    engine: Annotated[str, typer.Option(help="vllm, or paged: real KV blocks and transfers without a model")] = "vllm",
    model: Annotated[str, typer.Option(help="as in configs/disagg.yaml")] = "tiny-llama",
    dtype: Annotated[str, typer.Option(help="in bfloat16 an answer depends on what else is in the batch")] = "float32",
    distinct: Annotated[int, typer.Option(help="different requests, each of which is first answered in peace")] = 40,
    at_once: Annotated[int, typer.Option(help="requests that run at once")] = 6,
    every_s: Annotated[float, typer.Option(help="seconds between migrations")] = 1.0,
    restart_s: Annotated[float, typer.Option(help="seconds between restarts of a worker")] = 300.0,
    longest: Annotated[int, typer.Option(help="longest prompt and answer in tokens: halves of it")] = 900,
    seed: Annotated[int, typer.Option()] = 0,
    transport: Annotated[Transport, typer.Option("--nixl-transport")] = Transport.AUTO,
    json: Annotated[
        Path | None, typer.Option("--json", help="its plot goes beside it; benchmarks/results/soak-ENGINE.json")
    ] = None,
    logs: Annotated[Path | None, typer.Option(help="folder to keep all logs in")] = None,
) -> None:
    """Serve, move and restart for a long time, and look for anything that is lost, changed or left behind."""
    end_on_sigterm()
    console = Console()
    json = json or Path(f"benchmarks/results/soak-{engine}.json")
    report = Report(machine(), engine, model, transport.value, minutes)
    overrides = [f"--Common.engine={engine}", f"--Common.dtype={dtype}"]
    if engine == "paged":
        overrides.append(f"--Common.engine-args={{step_s: {_STEP_S}}}")
    with (
        tempfile.TemporaryDirectory() as scratch,
        running(Kind.OURS, model, transport, logs or Path(scratch), tuple(overrides), size=_SIZE) as system,
    ):
        console.print(f"up: {', '.join(part.name for part in system.parts)}")
        asyncio.run(_soak(system, report, distinct, at_once, every_s, restart_s, longest, seed, console))
    json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=0))
    plot(report.lives, report.restarts_s, json.with_suffix(".png"))
    for title, found in (
        ("errors", report.errors),
        ("changed", report.changed),
        ("leaks", report.leaks),
        ("grown", report.grown),
    ):
        console.print(f"{title}: {len(found)}", *found[:5], sep="\n  ", markup=False)
    console.print(
        f"{report.finished} requests ({report.dropped} dropped by their client), {report.tokens} tokens, "
        f"{report.moves} moves, not made: {report.not_made or 'none'}, {len(report.restarts_s)} restarts: "
        f"{'passed' if report.passed else 'FAILED'}",
        markup=False,
    )
    os._exit(0 if report.passed else 1)


async def _soak(
    system: System,
    report: Report,
    distinct: int,
    at_once: int,
    every_s: float,
    restart_s: float,
    longest: int,
    seed: int,
    console: Console,
) -> None:
    traffic = Traffic(system.url, bodies(report.model, distinct, seed, longest), seed)
    await Soak(system, report, traffic, console).run(at_once, every_s, restart_s)
    await traffic.close()
    tally = traffic.tally
    report.finished, report.dropped, report.tokens = tally.finished, tally.dropped, tally.tokens
    report.errors, report.changed = tally.errors, tally.changed
    if tally.gaps_s:
        p50, p99, most = np.percentile(tally.gaps_s, [50, 99, 100])
        report.worst_gap_ms = (1e3 * float(p50), 1e3 * float(p99), 1e3 * float(most))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
