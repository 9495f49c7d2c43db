# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.policy.calibrate live.json --json model.json``: parameters of the simulator from a real run.

Reads what ``benchmarks.policy.live --json`` has written. Step time is fitted to the run without migrations: each gap
between two tokens of a request is one step of its worker, whose batch, KV and prompts follow from the tokens of all
requests that were placed there (round robin: every other one). Transfer cost is fitted to the moves of the other run.
Then both runs are simulated with the fitted numbers and compared with the measurements, which gives the simulator's
error. Raises ``ConfigError`` for a file that is no such run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.policy.live import Answer, Live, Output
from components.errors import ConfigError
from components.migration.messages import MoveRecord
from planner_hooks.config import load
from planner_hooks.plan import Policy
from planner_hooks.simulate.cluster import Cluster
from planner_hooks.simulate.dispatch import Dispatch
from planner_hooks.simulate.model import Slo, WorkerModel, calibrate
from planner_hooks.simulate.report import report
from planner_hooks.simulate.traces import Arrival

_BLOCK = 32
_WORKERS = 2


class Compared(msgspec.Struct, frozen=True):
    """One figure, measured and simulated."""

    system: str
    figure: str
    measured: float
    simulated: float


class Fit(msgspec.Struct):
    """Result of the fit. ``benchmarks.policy --model`` reads ``model``."""

    model: WorkerModel
    steps: int
    """Gaps between tokens that the step time was fitted to."""
    step_error: float
    """Median of |fitted - measured| / measured."""
    compared: list[Compared]


def steps(answers: list[Answer]) -> list[tuple[int, int, int, float]]:
    """(batch, KV tokens, prompt tokens, seconds) of the steps of one worker."""
    times = [a.start_s + a.ttft_s + np.concatenate([[0.0], np.cumsum(a.itls_s)]) for a in answers]
    rows = []
    for mine in times:
        for begin, end in zip(mine[:-1], mine[1:], strict=True):
            # Requests with a token in this step, and their tokens so far.
            had = [int(np.searchsorted(t, end, side="right")) for t in times]
            took = [n - int(np.searchsorted(t, begin, side="right")) for n, t in zip(had, times, strict=True)]
            runs = [i for i, count in enumerate(took) if count > 0]
            kv = sum(answers[i].prompt_tokens + had[i] for i in runs)
            new = sum(answers[i].prompt_tokens for i in runs if had[i] == took[i])
            if max(took[i] for i in runs) <= 2:  # A longer gap: it was preempted, or its stream hung.
                rows.append((len(runs), kv, new, float(end - begin)))
    return rows


def transfer(moves: list[MoveRecord], model: WorkerModel) -> WorkerModel:
    """Fixed time, speed and downtime of the moves that copied something."""
    done = [move for move in moves if move.ok and move.bytes]
    if not done:
        return model
    overhead = min(move.total_s for move in done)
    beyond = sum(move.total_s - overhead for move in done)
    size, tokens = sum(move.bytes for move in done), sum(move.tokens for move in done)
    return msgspec.structs.replace(
        model,
        overhead_s=overhead,
        bytes_per_s=size / beyond if beyond > 1e-3 else model.bytes_per_s,
        downtime_s=float(np.median([move.downtime_s for move in done])),
        kv_bytes_per_token=max(1, size // max(1, tokens)),
    )


def fit(output: Output) -> Fit:
    """Everything that the run says about the simulator."""
    without = [live for live in output.systems if live.system == "without"]
    if output.prefill_worker or not without:
        raise ConfigError("the step time needs a run whose decode workers computed the prompts, without --prefill")
    rows = [row for repeat in without[0].answers for first in (0, 1) for row in steps(repeat[first::_WORKERS])]
    if len(rows) < 100:
        raise ConfigError(f"{len(rows)} steps are too few to fit a step time; run the load for longer")
    step = calibrate(rows)
    batch, kv, new, seconds = np.asarray(rows).T
    fitted = step.base_s + step.per_seq_s * batch + step.per_kv_token_s * kv + step.per_prefill_token_s * new
    model = WorkerModel(step=step, capacity_tokens=_BLOCK * output.shape.blocks, max_seqs=16, interference=0.0)
    model = transfer([move for live in output.systems for move in live.moves], model)
    error = float(np.median(np.abs(fitted - seconds) / np.maximum(seconds, 1e-6)))
    return Fit(model, len(rows), error, [c for live in output.systems for c in _compare(live, model)])


def _compare(live: Live, model: WorkerModel) -> list[Compared]:
    policy = load(Path(__file__).with_name("live.yaml")).build() if live.system == "plugin" else None
    simulated = [_simulate(repeat, model, policy) for repeat in live.answers]
    tpots = [1e3 * sum(a.itls_s) / max(1, len(a.itls_s)) for a in live.all()]
    measured = {
        "TTFT p50 ms": live.ttft_ms(50),
        "TTFT p99 ms": live.ttft_ms(99),
        "TPOT p50 ms": float(np.percentile(tpots, 50)),
        "TPOT p99 ms": float(np.percentile(tpots, 99)),
        "preemptions": sum(live.preemptions.values()) / len(live.answers),
        "moves": len([move for move in live.moves if move.ok]) / len(live.answers),
    }
    return [
        Compared(live.system, figure, value, float(np.mean([one[figure] for one in simulated])))
        for figure, value in measured.items()
    ]


def _simulate(answers: list[Answer], model: WorkerModel, policy: Policy | None) -> dict[str, float]:
    cluster = Cluster(model, _WORKERS, Dispatch.ROUND_ROBIN, policy)
    cluster.run([Arrival(a.start_s, a.prompt_tokens, len(a.itls_s) + 1) for a in answers])
    seen = report(cluster, len(answers), Slo())
    return {
        "TTFT p50 ms": seen.ttft_p50_ms,
        "TTFT p99 ms": seen.ttft_p99_ms,
        "TPOT p50 ms": seen.tpot_p50_ms,
        "TPOT p99 ms": seen.tpot_p99_ms,
        "preemptions": seen.preemptions,
        "moves": seen.migrations,
    }


def show(found: Fit, console: Console) -> None:
    """Measured beside simulated."""
    table = Table(title="simulator against the real run")
    for column in ("system", "figure", "measured", "simulated", "simulated / measured"):
        table.add_column(column, justify="left" if column in ("system", "figure") else "right")
    for c in found.compared:
        ratio = f"{c.simulated / c.measured:.2f}" if c.measured else ""
        table.add_row(c.system, c.figure, f"{c.measured:.1f}", f"{c.simulated:.1f}", ratio)
    console.print(table)
    console.print(f"{found.steps} steps, fitted with a median error of {found.step_error:.0%}: {found.model}")


def main(
    run: Annotated[Path, typer.Argument(help="file of benchmarks.policy.live --json")],
    json: Annotated[Path | None, typer.Option("--json", help="file for the fit, for benchmarks.policy --model")] = None,
) -> None:
    """Fit prefill, decode and transfer cost to a real run, and say how far the simulator is from it."""
    try:
        output = msgspec.json.decode(run.read_bytes(), type=Output)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{run} is no result of benchmarks.policy.live: {error}") from error
    found = fit(output)
    if json is not None:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(found)))
    show(found, Console(width=120))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
