# SPDX-License-Identifier: Apache-2.0
"""Step time of vLLM's engine with and without this package in it: ``python -m benchmarks.serving.steps``.

With: connector, scheduler and transfer agent. Both engines have the same arguments, run in processes of their own
(``steps_child``) on the same device and are asked in turn, the first one changing with each repeat. No Dynamo, no
migration. A step is the time between two tokens of a request; the first ones of each are left out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Annotated, Any, cast

import msgspec
import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.graph import arguments_of, end_on_sigterm, machine, place
from benchmarks.serving.parts import ENGINE, on_gpu
from benchmarks.serving.tables import table
from components import models
from components.errors import MigrateError
from components.serve import precision
from components.serve.servers import Servers

WITH, WITHOUT = "with", "without"


class Round(msgspec.Struct, frozen=True):
    """One engine's steps with a number of requests at once."""

    kind: str
    at_once: int
    repeat: int
    steps_s: list[list[float]]
    """Of each request."""


class Steps(msgspec.Struct):
    """Everything that was measured."""

    machine: dict[str, str]
    model: str
    date: str
    engine: dict[str, Any]
    rounds: list[Round] = []

    def rows(self) -> list[list[str]]:
        """Ratio of the means, the means of either, and those of the repeats."""
        rows = []
        for at_once in sorted({r.at_once for r in self.rounds}):
            found = {
                kind: [np.concatenate(r.steps_s) for r in self.rounds if (r.kind, r.at_once) == (kind, at_once)]
                for kind in (WITH, WITHOUT)
            }
            mine, base = (1e3 * np.concatenate(found[kind]) for kind in (WITH, WITHOUT))
            repeats = [" ".join(f"{1e3 * steps.mean():.2f}" for steps in found[kind]) for kind in (WITH, WITHOUT)]
            means = f"{mine.mean():.2f} / {base.mean():.2f}"
            late = f"{np.percentile(mine, 99):.2f} / {np.percentile(base, 99):.2f}"
            rows.append([str(at_once), f"{mine.mean() / base.mean():.3f}", means, late, " / ".join(repeats)])
        return rows

    def lines(self) -> list[str]:
        """A part of the report."""
        engine = json.dumps(self.engine)
        header = ["at once", "step with / without", "mean ms", "p99 ms", "means of the repeats"]
        return [
            f"{self.model}, {self.date}, {place(self.machine)}. Engine: `{engine}`.",
            "",
            *table(header, self.rows()),
        ]


class Child:
    """An engine in a process of its own."""

    def __init__(self, kind: str, model: str, engine: dict[str, Any], environment: dict[str, str]) -> None:
        self._kind = kind
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.serving.steps_child", kind, model, json.dumps(engine)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        cast(IO[str], self._process.stdin).close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def answer(self) -> Any:
        """The next one. Raises ``MigrateError`` when the engine is gone."""
        for line in cast(IO[str], self._process.stdout):
            if line.startswith("answer "):
                return json.loads(line.partition(" ")[2])
        raise MigrateError(f"the engine {self._kind} this package ended; its reason is above")

    def run(self, at_once: int, tokens: int) -> list[list[float]]:
        """Steps of requests that start together, in seconds."""
        stream = cast(IO[str], self._process.stdin)
        stream.write(json.dumps([at_once, tokens]) + "\n")
        stream.flush()
        return cast(list[list[float]], self.answer())


def main(
    model: Annotated[str, typer.Option(help="as in configs/disagg.yaml")] = "smollm2",
    device: Annotated[str, typer.Option(help="GPU of both engines; empty: CPU")] = "",
    engine_args: Annotated[str, typer.Option(help="vLLM's arguments for both, as JSON")] = '{"enforce_eager": true}',
    at_once: Annotated[str, typer.Option(help="numbers of requests, joined by commas")] = "1,4,8",
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    tokens: Annotated[int, typer.Option(min=20, help="of each request")] = 110,
    path: Annotated[Path, typer.Option("--json", help="file for the raw samples")] = Path("steps.json"),
) -> None:
    """Measure, and write the raw samples, from which the serving report takes them if they lie in its folder."""
    end_on_sigterm()
    engine = arguments_of(engine_args)
    engine.setdefault("dtype", "auto" if device else precision.on_cpu("auto"))
    found = Steps(machine(), model, time.strftime("%Y-%m-%d"), engine)
    servers = Servers()
    environment = dict(os.environ) | servers.start({}) | ENGINE | (on_gpu(device) if device else {})
    levels = [int(word) for word in at_once.split(",")]
    try:
        with ExitStack() as stack:
            resolved = models.resolve(model)
            children = {
                kind: stack.enter_context(Child(kind, resolved, engine, environment)) for kind in (WITH, WITHOUT)
            }
            for child in children.values():
                child.answer()
            for child in children.values():
                child.run(max(levels), 20)  # Warm up.
            for repeat in track(range(repeats), "repeats"):
                for kind in (WITH, WITHOUT) if repeat % 2 == 0 else (WITHOUT, WITH):
                    for level in levels:
                        found.rounds.append(Round(kind, level, repeat, children[kind].run(level, tokens)))
                path.write_bytes(msgspec.json.encode(found))
    finally:
        servers.stop()
    shown = Table("at once", "step with / without", "mean ms", "p99 ms", title=f"{model}: steps of the engine")
    for row in found.rows():
        shown.add_row(*row[:4])
    Console().print(shown)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
