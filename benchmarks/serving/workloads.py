# SPDX-License-Identifier: Apache-2.0
"""The arrivals of every workload: lengths from a published trace or made up, times by the workload's shape.

All systems get the same file, in Mooncake's format (``timestamp`` in ms, ``input_length``, ``output_length``,
``hash_ids`` of 16 tokens), which ``vllm bench serve --dataset-name timed_trace`` replays. Deterministic in the seed.
"""

from __future__ import annotations

import itertools
import json
from enum import StrEnum
from pathlib import Path

import msgspec
import numpy as np

from planner_hooks.simulate.traces import read

CHUNK = 16
"""Tokens for each hash id."""


class Workload(StrEnum):
    """What arrives, and what happens meanwhile."""

    STEADY = "steady"
    """Even gaps."""
    BURSTY = "bursty"
    """The same requests in groups of six."""
    SKEWED = "skewed"
    """One output in five is eight times as long."""
    MIXED = "mixed"
    """One prompt in four is eight times as long."""
    LONG = "long"
    """Even gaps, outputs four times as long: the undisturbed twin of the following three."""
    MOVED = "moved"
    """As long, with a migration every second."""
    RESTART = "restart"
    """As long, with SIGTERM to each decode worker in turn and its restart."""
    SCALE_DOWN = "scale-down"
    """As long, with SIGTERM to one decode worker that does not come back."""


ACTED = (Workload.MOVED, Workload.RESTART, Workload.SCALE_DOWN)


class Request(msgspec.Struct, frozen=True):
    """One arrival."""

    time_s: float
    prompt_tokens: int
    output_tokens: int


class Scale(msgspec.Struct, frozen=True):
    """Size of the load; lengths of a trace are clipped to it."""

    rate: float
    """Requests per second."""
    duration_s: float
    prompt: int = 96
    """Median prompt tokens of made-up requests, a quarter of the longest one."""
    output: int = 48
    restart_s: float = 90.0
    """How long arrivals go on while workers are restarted."""
    seed: int = 0
    trace: str = ""
    """File in the Azure, BurstGPT or Mooncake format; empty makes lengths up."""


def _lengths(scale: Scale, count: int) -> list[tuple[int, int]]:
    """Prompt and output tokens: a trace's, or log-normal prompts and Pareto outputs with the scale's medians."""
    if scale.trace:
        found = [(a.prompt_tokens, a.output_tokens) for a in read(Path(scale.trace))]
    else:
        rng = np.random.default_rng(scale.seed)
        prompts, outputs = rng.lognormal(6.2, 1.0, count), rng.pareto(1.6, count) + 1
        prompts, outputs = prompts * scale.prompt / np.median(prompts), outputs * scale.output / np.median(outputs)
        found = list(zip(prompts.astype(int).tolist(), outputs.astype(int).tolist(), strict=True))
    pairs = [(min(max(p, 4), 4 * scale.prompt), min(max(o, 4), 2 * scale.output)) for p, o in found]
    return list(itertools.islice(itertools.cycle(pairs), count))


def arrivals(workload: Workload, scale: Scale) -> list[Request]:
    """The requests of a workload in order of time."""
    duration = scale.duration_s
    rate = scale.rate
    if workload in ACTED or workload is Workload.LONG:
        rate /= 2
        duration = scale.restart_s if workload is Workload.RESTART else duration * 1.5
    count = max(6, int(rate * duration))
    lengths = _lengths(scale, count)
    requests = []
    for number, (prompt, output) in enumerate(lengths):
        time_s = number / rate
        match workload:
            case Workload.BURSTY:
                time_s = (number - number % 6) / rate
            case Workload.SKEWED:
                output = output * 8 if number % 5 == 0 else output // 2
            case Workload.MIXED:
                prompt = prompt * 8 if number % 4 == 0 else prompt // 2
            case Workload.STEADY:
                pass
            case _:
                output *= 4
        requests.append(Request(time_s, max(prompt, 4), max(output, 4)))
    return requests


def together(count: int, prompt: int, output: int) -> list[Request]:
    """Equal requests that all wait from the start, for a client that limits how many run at once."""
    return [Request(0.0, prompt, output) for _ in range(count)]


def write(requests: list[Request], path: Path, first_id: int = 0) -> None:
    """As a Mooncake trace. ``first_id`` keeps the prompts of two files apart, so that no prefix cache helps."""
    ids = itertools.count(first_id)
    with path.open("w") as file:
        for request in requests:
            row = {
                "timestamp": round(request.time_s * 1e3, 3),
                "input_length": request.prompt_tokens,
                "output_length": request.output_tokens,
                "hash_ids": [next(ids) for _ in range(-(-request.prompt_tokens // CHUNK))],
            }
            file.write(json.dumps(row) + "\n")
