# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.policy.replay``: Dynamo's own replay of a wave, with the planner and the plugin in the loop.

A second opinion on scale-down: simulator and planner are Dynamo's (1.4), the load is that of benchmarks.policy. Three
runs on the same trace: all workers all the time, Dynamo's planner alone, and the planner with the plugin, whose
CONSTRAIN stage holds each reduction. Replay has no migrations: moves are planned and counted, and a victim counts as
empty one decision later. Raises ``MigrateError`` with the end of the output when a replay fails.
"""

from __future__ import annotations

import itertools
import json as jsonlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.graph import machine
from components.errors import MigrateError
from planner_hooks.simulate.traces import Arrival, Shape, synthetic

_BLOCK = 16
_HASHED = 512
"""Tokens for each hash id of the trace."""


class Replayed(msgspec.Struct, frozen=True):
    """One replay. Times in milliseconds."""

    planner: str
    requests: int
    worker_hours: float
    ttft_p99_ms: float
    itl_p50_ms: float
    itl_p99_ms: float
    e2e_p50_ms: float
    e2e_p99_ms: float
    reductions: int
    additions: int
    held: int
    """Proposals of fewer workers that the plugin held."""
    moves: int
    """Planned by the policies; replay carries none out."""


class Output(msgspec.Struct, frozen=True):
    """Everything that was measured."""

    machine: dict[str, str]
    workers: int
    rate: float
    duration_s: float
    results: list[Replayed]


def write_trace(arrivals: list[Arrival], path: Path) -> None:
    """In Mooncake's format; no prompt shares anything with another one."""
    ids = itertools.count()
    rows = (
        {
            "timestamp": round(1e3 * a.time_s, 3),
            "input_length": a.prompt_tokens,
            "output_length": a.output_tokens,
            "hash_ids": [next(ids) for _ in range(-(-a.prompt_tokens // _HASHED))],
        }
        for a in arrivals
    )
    path.write_text("".join(jsonlib.dumps(row) + "\n" for row in rows))


def planner_config(workers: int, tokens: int, policy_file: str) -> dict[str, Any]:
    """Keys of Dynamo's planner; without a policy file it runs alone."""
    config: dict[str, Any] = {
        "environment": "virtual",
        "namespace": "dynamo",
        "backend": "mocker",
        "mode": "disagg",
        "model_name": "replayed",
        "prefill_engine_num_gpu": 1,
        "decode_engine_num_gpu": 1,
        "optimization_target": "load",
        "prefill_scale_up_queue_tokens": 1_000_000,
        "prefill_scale_down_queue_tokens": 0,
        "decode_scale_up_kv_rate": 70,
        "decode_scale_down_kv_rate": 40,
        "max_gpu_budget": workers + 1,
        "load_adjustment_interval_seconds": 5,
        "scheduling": {"scale_interval_seconds": 5},
        "pre_deployment_sweeping_mode": "none",
        "live_dashboard_port": 0,
        "report_interval_hours": None,
    }
    if policy_file:
        shared = {
            "module": "planner_hooks.plugin",
            "priority": 5,
            "needs": ["observations.fpm", "observations.workers"],
        }
        own = {"policy_file": policy_file, "replay_tokens": tokens}
        propose = {"class": "MigrationPlugin", "plugin_id": "migration", "plugin_type": "propose", "kwargs": own}
        constrain = {"class": "ScaleDownPlugin", "plugin_id": "scale-down", "plugin_type": "constrain"}
        constrain["kwargs"] = own | {"decode_workers": [1, workers]}  # type: ignore[assignment]
        config["plugin_registration"] = {
            "auth": {"trusted_sources": ["allow_unauthenticated"]},
            "in_process_plugins": [shared | propose, shared | constrain],
        }
    return config


def replay(name: str, trace: Path, workers: int, tokens: int, config: dict[str, Any] | None) -> Replayed:
    """One run of ``python -m dynamo.replay``."""
    report = trace.with_name(f"{name}.json")
    engine = {"num_gpu_blocks": tokens // _BLOCK, "block_size": _BLOCK, "max_num_seqs": 256}
    command = [sys.executable, "-m", "dynamo.replay", str(trace), "--trace-block-size", str(_HASHED)]
    for role, budget in (("prefill", 8192), ("decode", 2048)):
        own = engine | {"worker_type": role, "max_num_batched_tokens": budget}
        command += [f"--{role}-engine-args", jsonlib.dumps(own)]
    command += ["--num-prefill-workers", "1", "--num-decode-workers", str(workers), "--report-json", str(report)]
    if config is not None:
        planner = trace.with_name(f"{name}.yaml")  # JSON is YAML.
        planner.write_text(jsonlib.dumps(config))
        command += ["--planner-config", str(planner)]
    done = subprocess.run(command, capture_output=True, text=True)
    text = done.stdout + done.stderr
    if done.returncode or not report.exists():
        raise MigrateError(f"dynamo.replay has failed:\n{text[-2000:]}")
    found = jsonlib.loads(report.read_text())
    return Replayed(
        planner=name,
        requests=found["completed_requests"],
        worker_hours=found["decode_worker_seconds"] / 3600,
        ttft_p99_ms=found["p99_ttft_ms"],
        itl_p50_ms=found["median_itl_ms"],
        itl_p99_ms=found["p99_itl_ms"],
        e2e_p50_ms=found["median_e2e_latency_ms"],
        e2e_p99_ms=found["p99_e2e_latency_ms"],
        reductions=len(re.findall(r"\[decode\].*\(scale_down\)", text)),
        additions=len(re.findall(r"\[decode\].*\(scale_up\)", text)),
        held=len(re.findall(r"let through \((?:draining|delayed)\)", text)),
        moves=sum(int(count) for count in re.findall(r"(\d+) moves planned on simulated workers", text)),
    )


def show(output: Output, console: Console) -> None:
    """Ratios to all workers all the time first."""
    table = Table(title=f"dynamo.replay, {output.workers} decode workers, a wave of {output.duration_s:g} s")
    for column in ("planner", "saved", "E2E p99", "worker-h", "TTFT p99", "ITL p50", "p99", "E2E p50", "p99"):
        table.add_column(column, justify="left" if column == "planner" else "right")
    for column in ("fewer", "more", "held", "moves"):
        table.add_column(column, justify="right")
    base = output.results[0]
    for r in output.results:
        table.add_row(
            r.planner,
            f"{1 - r.worker_hours / base.worker_hours:.0%}",
            f"{r.e2e_p99_ms / base.e2e_p99_ms:.2f}x",
            f"{r.worker_hours:.3f}",
            *(f"{v:.1f}" for v in (r.ttft_p99_ms, r.itl_p50_ms, r.itl_p99_ms)),
            *(f"{v:.0f}" for v in (r.e2e_p50_ms, r.e2e_p99_ms)),
            *(str(v) for v in (r.reductions, r.additions, r.held, r.moves)),
        )
    console.print(table)


def main(
    workers: Annotated[int, typer.Option(help="decode workers at most")] = 8,
    rate: Annotated[float, typer.Option(help="requests per second at the crests")] = 6.0,
    duration: Annotated[float, typer.Option(help="simulated seconds, two waves")] = 300.0,
    capacity_tokens: Annotated[int, typer.Option(help="KV of one worker")] = 50_000,
    policy_file: Annotated[str, typer.Option()] = "configs/policy.yaml",
    json: Annotated[Path | None, typer.Option("--json", help="file for all figures")] = None,
) -> None:
    """Worker-hours and latencies of Dynamo's replay, without a planner, with it, and with the plugin."""
    with tempfile.TemporaryDirectory(prefix="dynamo-migrate-replay-") as folder:
        trace = Path(folder) / "trace.jsonl"
        write_trace(synthetic(Shape.WAVE, rate, duration, 1), trace)
        alone, plugin = (planner_config(workers, capacity_tokens, file) for file in ("", policy_file))
        runs = (("none", None), ("planner", alone), ("planner + plugin", plugin))
        results = [replay(name, trace, workers, capacity_tokens, config) for name, config in runs]
    output = Output(machine(), workers, rate, duration, results)
    if json is not None:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(output)))
    show(output, Console(width=140))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
