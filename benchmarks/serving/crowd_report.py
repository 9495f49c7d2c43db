# SPDX-License-Identifier: Apache-2.0
"""What a package costs where nothing moves, as a table: ratios first, with 95% intervals over whole repeats."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks.graph import place
from benchmarks.serving.crowd import Crowd, CrowdRun, figures
from benchmarks.serving.parts import TITLES, Kind
from benchmarks.serving.tables import table

_OURS, _STOCK = Kind.OURS_AGG.value, Kind.STOCK_AGG.value
_RATIOS = ("tokens_s", "itl_p99", "ttft_p99")
_CPU = ("front", "worker", "engine", "client")


def lines(crowd: Crowd, raw: Path | None = None) -> list[str]:
    """A section of the report; none without runs. ``raw`` is the file with the samples."""
    if not crowd.runs:
        return []
    header = ["streams", "throughput, ours / stock", "p99 ITL", "p99 TTFT", "repeats"]
    header += ["tokens/s, ours / stock / `vllm serve`", "ITL p50 ms", "ITL p99 ms", "TTFT p50 ms", "TTFT p99 ms"]
    levels = sorted({run.streams for run in crowd.runs})
    errors = sum(len(run.seen.errors) for run in crowd.runs)
    samples = f"Raw samples: `{raw}`. " if raw is not None else ""
    used = [cell for level in levels for cell in _used(crowd, level)]
    return [
        f"## Streams without migrations: {crowd.model}",
        "",
        f"{crowd.date}, {place(crowd.machine)}. One worker, closed loop, {crowd.load.prompt} prompt and on "
        f"average {crowd.load.output} output tokens, greedy; windows of {crowd.load.seconds:g} s in turn. Ours: "
        f"{TITLES[Kind.OURS_AGG]}. Stock: {TITLES[Kind.STOCK_AGG]}. Goal: throughput at least 0.98, p99 ITL and p99 "
        f"TTFT at most 1.05. All repeats pooled, in brackets 95% intervals (bootstrap over whole repeats). "
        f"{errors} errors. {samples}Engine: {'; '.join(crowd.chosen.get(_OURS, [])) or 'defaults'}.",
        "",
        *table(header, [_row(crowd, level) for level in levels]),
        "Processors, microseconds for each token (front: Dynamo's frontend; engine: the worker's engine core; client: "
        "the load itself, on the same machine):",
        "",
        *table(["system, streams", *_CPU, "tokens in a chunk"], used),
        *([f"Left out: {'; '.join(crowd.errors)}.", ""] if crowd.errors else []),
    ]


def _of(crowd: Crowd, system: str, streams: int) -> dict[int, CrowdRun]:
    return {run.repeat: run for run in crowd.runs if (run.system, run.streams) == (system, streams)}


def _row(crowd: Crowd, streams: int) -> list[str]:
    ours, stock, vllm = (_of(crowd, kind, streams) for kind in (_OURS, _STOCK, Kind.VLLM.value))
    pairs = [(ours[repeat], stock[repeat]) for repeat in sorted(ours.keys() & stock.keys())]
    each = [figures(list(runs.values())) if runs else {} for runs in (ours, stock, vllm)]
    cells = [str(streams), *_ratios(pairs), str(len(pairs))]
    for name, form in (
        ("tokens_s", ",.0f"),
        ("itl_p50", ".1f"),
        ("itl_p99", ".1f"),
        ("ttft_p50", ".0f"),
        ("ttft_p99", ".0f"),
    ):
        cells.append(" / ".join(f"{found[name]:{form}}" if found else "-" for found in each))
    return cells


def _ratios(pairs: list[tuple[CrowdRun, CrowdRun]]) -> list[str]:
    if not pairs:
        return ["-" for _ in _RATIOS]

    @cache
    def of(drawn: tuple[int, ...]) -> list[float]:
        ours, stock = (figures([pairs[number][which] for number in drawn]) for which in (0, 1))
        return [ours[name] / stock[name] if stock[name] else np.nan for name in _RATIOS]

    numbers = range(len(pairs))
    texts = [f"{ratio:.3f}" for ratio in of(tuple(numbers))]
    if len(pairs) < 3:
        return texts
    random = np.random.default_rng(0)
    # Repeats are drawn, not requests: those of one run share its luck. Most draws differ in their order alone.
    drawn = [of(tuple(sorted(random.integers(0, len(pairs), len(pairs)).tolist()))) for _ in range(300)]
    low, high = np.percentile(drawn, (2.5, 97.5), axis=0)
    return [f"{text} ({least:.3f} to {most:.3f})" for text, least, most in zip(texts, low, high, strict=True)]


def _used(crowd: Crowd, streams: int) -> Iterator[list[str]]:
    for kind in (_OURS, _STOCK, Kind.VLLM.value):
        runs = list(_of(crowd, kind, streams).values())
        if runs:
            found = figures(runs)
            joined = sum(run.seen.tokens for run in runs) / max(1, sum(run.seen.chunks for run in runs))
            yield [f"{kind}, {streams}", *(f"{found.get(f'cpu_{name}', 0.0):.0f}" for name in _CPU), f"{joined:.2f}"]
