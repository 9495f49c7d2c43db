# SPDX-License-Identifier: Apache-2.0
"""Where workers spend their time: ``python -m benchmarks.serving.profile --when before``.

Serves the disaggregated graph, keeps eight requests running and lets py-spy sample each process (``pip install
py-spy``; it may need root). Adds the shares to the raw samples of the report.
"""

from __future__ import annotations

import collections
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from benchmarks.graph import end_on_sigterm
from benchmarks.serving.load import Load
from benchmarks.serving.parts import Kind, Part
from benchmarks.serving.systems import running
from benchmarks.serving.workloads import together
from components.errors import MigrateError
from components.transfer import Transport


class Profile(msgspec.Struct, frozen=True):
    """Functions of one process by share of samples in them."""

    when: str
    process: str
    samples: int
    seconds: int
    top: tuple[tuple[str, float], ...]
    """By self time."""
    ours: tuple[tuple[str, float], ...] = ()
    """By the innermost function of this package on the stack, with all that it calls."""


def self_time(path: Path, when: str, process: str, seconds: int) -> Profile:
    """Read py-spy's raw format: ``frame;frame;frame count`` per line."""
    functions: collections.Counter[str] = collections.Counter()
    ours: collections.Counter[str] = collections.Counter()
    for line in path.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        frames = [frame for frame in stack.split(";") if not frame.startswith("process ")]
        if not frames:
            continue
        functions[_short(frames[-1])] += int(count)
        # What only ``asyncio.run`` of this package is under is the event loop's.
        mine = [frame for frame in frames if "/components/" in frame and "/components/process.py" not in frame]
        if mine:
            ours[_short(mine[-1])] += int(count)
    total = max(1, functions.total())
    top = tuple((name, count / total) for name, count in functions.most_common(15))
    return Profile(
        when, process, total, seconds, top, tuple((name, count / total) for name, count in ours.most_common(15))
    )


def _short(frame: str) -> str:
    name, _, place = frame.partition(" (")
    return f"{name} ({'/'.join(place.rstrip(')').split(':')[0].split('/')[-3:])})" if place else name


def _record(part: Part, seconds: int, output: Path) -> subprocess.Popen[bytes]:
    if part.process is None:
        raise MigrateError(f"{part.name} does not run")
    command = [str(Path(sys.executable).parent / "py-spy"), "record", "--pid", str(part.process.pid), "--subprocesses"]
    command += ["--format", "raw", "--gil", "--nolineno", "--full-filenames", "--rate", "200"]
    return subprocess.Popen(
        [*command, "--duration", str(seconds), "--output", str(output)], stdout=subprocess.DEVNULL, stderr=sys.stderr
    )


def main(
    when: Annotated[str, typer.Option(help="label in the report")] = "now",
    seconds: Annotated[int, typer.Option()] = 15,
    model: Annotated[str, typer.Option()] = "tiny-llama",
    json: Annotated[Path, typer.Option("--json", help="report file to add to")] = Path(
        "benchmarks/results/serving-cpu.json"
    ),
) -> None:
    """Profile every process of the graph under load."""
    from benchmarks.serving.report import Report

    end_on_sigterm()
    console = Console()
    profiles = []
    with (
        tempfile.TemporaryDirectory(prefix="dynamo-migrate-bench-") as scratch,
        Load(Path(scratch)) as load,
        running(Kind.OURS, model, Transport.AUTO) as system,
    ):
        load.run(system, together(8, 96, 48), 0, 4)
        chosen = [part for part in system.parts if part.name in ("DecodeWorker0", "PrefillWorker0")]
        files = {part.name: Path(scratch) / f"{part.name}.txt" for part in chosen}
        spies = [_record(part, seconds, files[part.name]) for part in chosen]
        while any(spy.poll() is None for spy in spies):
            load.run(system, together(32, 96, 96), 0, 8)
        profiles = [self_time(files[part.name], when, part.name, seconds) for part in chosen]
    for profile in profiles:
        console.print(f"[bold]{profile.when}: {profile.process}[/], {profile.samples} samples with the GIL")
        for title, rows in (("self time", profile.top), ("of this package, with callees", profile.ours)):
            console.print(f"  {title}")
            for name, share in rows:
                console.print(f"  {share:6.1%}  {name}", markup=False)
    if json.is_file():
        report = msgspec.json.decode(json.read_bytes(), type=Report)
        report.profiles = [p for p in report.profiles if p.when != when] + profiles
        json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=0))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
    os._exit(0)
