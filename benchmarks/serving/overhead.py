# SPDX-License-Identifier: Apache-2.0
"""Router and connector against the same workers without them, both systems up at once, their runs in turn.

Without: Dynamo's frontend and two aggregated ``dynamo.vllm``. With: the same frontend, this package's router, two
aggregated workers with its connector. The client keeps a number of requests running; nothing migrates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.serving.load import Load
from benchmarks.serving.metrics import Run, duration
from benchmarks.serving.parts import Kind
from benchmarks.serving.systems import running
from benchmarks.serving.workloads import together
from components.transfer import Transport

_PROMPT, _OUTPUT = 96, 48


class Cost(msgspec.Struct, frozen=True):
    """Time on processors that one process needs for each output token."""

    system: str
    process: str
    us_per_token: float


class Hop(msgspec.Struct):
    """Times of tokens from the sending of each request, in seconds: of reports from when there was a router."""

    direct: list[list[float]] = []
    routed: list[list[float]] = []


def measure(
    load: Load,
    model: str,
    transport: Transport,
    levels: list[int],
    repeats: int,
    seed: int,
    logs: Path | None,
    engine: Mapping[str, Any],
    devices: tuple[int, ...],
    say: Callable[[str], None],
    keep: Callable[[list[Run]], None],
) -> tuple[list[Run], list[Cost]]:
    """Runs of both systems at each number of requests at once, and their costs."""
    runs: list[Run] = []
    spent: dict[str, Counter[str]] = {}
    tokens: Counter[str] = Counter()
    with ExitStack() as stack:
        systems = [
            stack.enter_context(running(kind, model, transport, logs, engine=engine, devices=devices))
            for kind in (Kind.STOCK_AGG, Kind.OURS_AGG)
        ]
        say("overhead: both systems are up")
        for system in systems:
            load.run(system, together(8, _PROMPT, _OUTPUT), seed, 4)  # Warm up.
        for repeat in range(repeats):
            for at_once in levels:
                # The order changes with each repeat, so that a drift of the machine favours none.
                for system in systems if repeat % 2 == 0 else reversed(systems):
                    before = system.processor_seconds()
                    samples = load.run(system, together(max(16, 8 * at_once), _PROMPT, _OUTPUT), seed, at_once)
                    after = system.processor_seconds()
                    mine = spent.setdefault(system.kind.value, Counter())
                    mine.update({name: seconds - before.get(name, 0.0) for name, seconds in after.items()})
                    tokens[system.kind.value] += sum(s.tokens for s in samples)
                    run = Run(system.kind.value, "closed loop", repeat, samples, duration(samples), at_once=at_once)
                    runs.append(run)
                    keep(runs)
                    say(f"overhead: {system.kind}, {at_once} at once, repeat {repeat + 1}: {run.duration_s:.1f} s")
    costs = [
        Cost(kind, name, 1e6 * seconds / tokens[kind]) for kind, mine in spent.items() for name, seconds in mine.items()
    ]
    return runs, costs
