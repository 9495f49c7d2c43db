# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.serving --quick``: every system in turn, then ``benchmarks/report.md``."""

from __future__ import annotations

import itertools
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from benchmarks.graph import arguments_of, end_on_sigterm, machine
from benchmarks.serving import crowd, crowd_report
from benchmarks.serving.actions import Action, moves, rolling_restart, scale_down
from benchmarks.serving.load import Control, Load
from benchmarks.serving.metrics import Event, Run, Slo, duration
from benchmarks.serving.parts import Kind
from benchmarks.serving.report import Report, merge, write_report
from benchmarks.serving.systems import System, running
from benchmarks.serving.workloads import Scale, Workload, arrivals
from components.errors import MigrateError
from components.transfer import Transport

_ACTIONS: dict[Workload, Action] = {
    Workload.MOVED: moves,
    Workload.RESTART: rolling_restart,
    Workload.SCALE_DOWN: scale_down,
}
_OPEN = [Workload.STEADY, Workload.BURSTY, Workload.SKEWED, Workload.MIXED]
# The scale-down comes last: nobody brings the worker back.
_PLAN: dict[Kind, list[Workload]] = {
    Kind.VLLM: _OPEN,
    Kind.STOCK: [*_OPEN, Workload.LONG, Workload.RESTART, Workload.SCALE_DOWN],
    Kind.STOCK_RETRY: [Workload.LONG, Workload.RESTART, Workload.SCALE_DOWN],
    Kind.OURS: [*_OPEN, Workload.LONG, Workload.MOVED, Workload.RESTART, Workload.SCALE_DOWN],
    Kind.PLANNER: [*_OPEN, Workload.LONG],
}
_QUICK: dict[Kind, list[Workload]] = {
    Kind.VLLM: [Workload.STEADY, Workload.MIXED],
    Kind.STOCK: [Workload.STEADY, Workload.MIXED, Workload.LONG, Workload.SCALE_DOWN],
    Kind.STOCK_RETRY: [Workload.LONG, Workload.SCALE_DOWN],
    Kind.OURS: [Workload.STEADY, Workload.MIXED, Workload.LONG, Workload.MOVED, Workload.SCALE_DOWN],
}
"""What fits into ten minutes on two cores, of which every start of a system takes half a minute."""
_CROWD = "overhead"
"""The name under which ``--systems`` has the workload ``crowd``."""
_RESULTS = Path("benchmarks/results/serving-cpu.json")
_REPORT = Path("benchmarks/report.md")


def main(
    quick: Annotated[bool, typer.Option("--quick", help="fewer and shorter loads: ten minutes on two cores")] = False,
    systems: Annotated[str, typer.Option(help="joined by commas; empty takes all, 'overhead' is one of them")] = "",
    workloads: Annotated[str, typer.Option(help="joined by commas; empty takes all")] = "",
    model: Annotated[
        str, typer.Option(help="as in configs/disagg.yaml, or llama-3.1-8b, its shape; empty: tiny-llama, on GPUs that")
    ] = "",
    rate: Annotated[float, typer.Option(help="requests per second")] = 3.0,
    repeats: Annotated[int, typer.Option(help="times each workload is run on each system")] = 0,
    restart_s: Annotated[float, typer.Option(help="seconds of load while workers restart; 0: 90, --quick: 60")] = 0.0,
    trace: Annotated[Path | None, typer.Option(help="lengths from an Azure, BurstGPT or Mooncake trace")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    devices: Annotated[str, typer.Option(help="GPUs that workers take in turn, joined by commas; empty: CPU")] = "",
    engine_args: Annotated[str, typer.Option(help="vLLM's arguments for all workers, as JSON")] = "{}",
    transport: Annotated[Transport, typer.Option("--nixl-transport")] = Transport.AUTO,
    json: Annotated[Path, typer.Option("--json", help="file for the raw samples")] = _RESULTS,
    add: Annotated[bool, typer.Option("--add", help="keep the runs of other systems that the file holds")] = False,
    report: Annotated[Path, typer.Option("--report", help="Markdown file; plots go beside the raw samples")] = _REPORT,
    report_only: Annotated[bool, typer.Option("--report-only", help="run nothing, write the report again")] = False,
    logs: Annotated[Path | None, typer.Option(help="folder to keep all logs in")] = None,
    streams: Annotated[str, typer.Option(help="overhead: numbers of streams, joined by commas")] = "8",
    lengths: Annotated[str, typer.Option(help="overhead: tokens of prompt, and of answers on average")] = "16,200",
    seconds: Annotated[float, typer.Option(help="overhead: length of each window")] = 8.0,
    start_s: Annotated[float, typer.Option(help="overhead: longest start of the systems")] = 240.0,
    limit_s: Annotated[float, typer.Option(help="overhead: begin no repeat that would end later than this")] = 3600.0,
) -> None:
    """Serve the same seeded arrivals with each system and compare."""
    end = time.monotonic() + limit_s
    end_on_sigterm()
    console = Console(soft_wrap=True)
    model = model or ("llama-3.1-8b" if devices else "tiny-llama")
    names = [word.strip() for word in systems.split(",") if word.strip()]
    if not report_only and (not names or _CROWD in names):
        raw = (
            json
            if names == [_CROWD] and json != _RESULTS
            else json.parent / f"crowd-{'gpu' if devices else 'cpu'}.json"
        )
        load = crowd.Load(*_numbers(lengths, "--lengths"), seconds)
        new = crowd.Crowd(machine(), model, time.strftime("%Y-%m-%d"), load, arguments_of(engine_args))
        where = (transport, _numbers(devices, "--devices"), logs, start_s, end, console)
        _crowd(raw, new, add, list(_numbers(streams, "--streams")), repeats or (2 if quick else 6), *where)
        if names == [_CROWD]:
            return
    if not report_only:
        restart = restart_s or (60.0 if quick else 90.0)
        scale = Scale(rate, 6.0 if quick else 20.0, restart_s=restart, seed=seed)
        scale = msgspec.structs.replace(scale, trace=str(trace or ""))
        found = Report(machine(), model, transport.value, scale, Slo(), time.strftime("%Y-%m-%d"))
        gpus, engine = _numbers(devices, "--devices"), arguments_of(engine_args)
        if engine:
            found.machine["engine"] = engine_args
        chosen = [Workload(word) for word in workloads.split(",") if word]
        before = msgspec.json.decode(json.read_bytes(), type=Report) if add and json.is_file() else None

        def keep() -> None:
            # After every run: what was measured survives whatever happens to the next one.
            whole = merge(before, found) if before else found
            json.parent.mkdir(parents=True, exist_ok=True)
            json.write_bytes(msgspec.json.format(msgspec.json.encode(whole), indent=0))

        with tempfile.TemporaryDirectory(prefix="dynamo-migrate-bench-") as scratch, Load(Path(scratch)) as load:
            plan = _QUICK if quick and not workloads else _PLAN
            if chosen:
                plan = {kind: [w for w in planned if w in chosen] for kind, planned in plan.items()}
            _run(found, load, names, plan, repeats or (1 if quick else 3), logs, engine, gpus, console, keep)
        keep()
    write_report(report, json)
    console.print(f"{report} is written from {json.parent}")


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(",") if word.strip())
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: write numbers like 8,64", param_hint=option) from error


def _crowd(
    raw: Path,
    found: crowd.Crowd,
    add: bool,
    streams: list[int],
    repeats: int,
    transport: Transport,
    devices: tuple[int, ...],
    logs: Path | None,
    start_s: float,
    end: float,
    console: Console,
) -> None:
    if add and raw.is_file():
        found.runs = msgspec.json.decode(raw.read_bytes(), type=crowd.Crowd).runs

    def keep() -> None:
        raw.parent.mkdir(parents=True, exist_ok=True)
        raw.write_bytes(msgspec.json.encode(found))

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    with tempfile.TemporaryDirectory(prefix="dynamo-migrate-bench-") as scratch:
        try:
            crowd.measure(found, streams, repeats, transport, devices, logs or Path(scratch), start_s, end, say, keep)
        except MigrateError as error:
            say(str(error))
    say("\n".join(crowd_report.lines(found)))
    say(f"raw samples: {raw}")


def _run(
    found: Report,
    load: Load,
    names: list[str],
    plan: dict[Kind, list[Workload]],
    repeats: int,
    logs: Path | None,
    engine: dict[str, Any],
    devices: tuple[int, ...],
    console: Console,
    keep: Callable[[], None],
) -> None:
    chosen = [kind for kind, todo in plan.items() if todo and (not names or kind.value in names)]
    # Kinds with the same workers follow each other and share them: most of a start is the workers' imports.
    for kinds in [list(group) for _, group in itertools.groupby(chosen, key=lambda kind: kind.workers)]:
        kind = kinds[0]
        try:
            where = (kind, found.model, Transport(found.transport), logs)
            with running(*where, engine=engine, devices=devices) as system:
                for kind in kinds:
                    if kind is not system.kind:
                        system.become(kind)
                    console.print(f"{kind}: up")
                    _system(found, load, system, plan[kind], repeats, console, keep)
        except MigrateError as error:
            lost = ", ".join(kinds[kinds.index(kind) :])
            console.print(f"[red]{lost}: {error}")
            found.errors.append(f"{lost}: {error}".splitlines()[0])  # The rest has paths of this machine.


def _system(
    found: Report,
    load: Load,
    system: System,
    todo: list[Workload],
    repeats: int,
    console: Console,
    keep: Callable[[], None],
) -> None:
    load.run(system, arrivals(Workload.STEADY, Scale(4.0, 2.0)), found.scale.seed)  # Warm up.
    once = (Workload.RESTART, Workload.SCALE_DOWN)
    control = Control(system) if system.kind.ours else None
    try:
        for repeat in range(repeats):
            for workload in todo:
                if workload in once and repeat < repeats - 1:
                    continue
                run = _one(found, load, system, control, workload, repeat)
                found.runs.append(run)
                keep()
                failed = sum(s.failed for s in run.samples)
                console.print(
                    f"{system.kind}: {workload}: {len(run.samples)} requests, {failed} failed, "
                    f"{len(run.moves)} moves, {run.duration_s:.1f} s"
                )
    finally:
        if control is not None:
            control.__exit__(None, None, None)


def _one(found: Report, load: Load, system: System, control: Control | None, workload: Workload, repeat: int) -> Run:
    over = threading.Event()
    events: list[Event] = []
    failures: list[BaseException] = []

    def act() -> None:
        try:
            events.extend(_ACTIONS[workload](system, control, over))
        except (MigrateError, OSError) as error:
            failures.append(error)

    known = len(control.status().moves) if control else 0
    retried, alive = system.retried(), system.worker_seconds()
    actor = threading.Thread(target=act)
    if workload in _ACTIONS:
        actor.start()
    samples = load.run(system, arrivals(workload, found.scale), found.scale.seed)
    alive = system.worker_seconds() - alive
    over.set()
    if workload in _ACTIONS:
        actor.join()
    if failures:
        raise MigrateError(f"{workload}: {failures[0]}")
    made = list(control.status().moves[known:]) if control else []
    return Run(
        *(system.kind.value, workload.value, repeat, samples, duration(samples)),
        worker_s=alive,
        retried=system.retried() - retried,
        events=events,
        moves=made,
    )


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
    os._exit(0)
