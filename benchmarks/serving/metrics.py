# SPDX-License-Identifier: Apache-2.0
"""Formulas. All but goodput and worker-hours are those of ``vllm bench serve``; percentiles interpolate linearly.

TTFT      first chunk - request sent
E2E       last chunk - request sent
TPOT      (E2E - TTFT) / (tokens - 1), of requests with more than one token
ITL       gaps between the chunks of all requests, pooled
failed    an error, or another number of tokens than was asked for (vLLM's client counts a stream that
          breaks after its first chunk as a success; this does not)
goodput   requests that did not fail and kept TTFT and TPOT within the objectives, for each second
saved     worker-hours saved at equal goodput: 1 - (W / G) / (W0 / G0), W worker-hours and G good requests
"""

from __future__ import annotations

import msgspec
import numpy as np

from components.migration.messages import MoveRecord


class Slo(msgspec.Struct, frozen=True):
    """Service level objectives."""

    ttft_s: float = 1.0
    tpot_s: float = 0.05


class Sample(msgspec.Struct, frozen=True):
    """One request as the client saw it. ``start_s`` is on the machine's monotonic clock."""

    start_s: float
    ttft_s: float
    itls_s: tuple[float, ...]
    tokens: int
    wanted: int
    prompt_tokens: int
    error: str = ""

    @property
    def failed(self) -> bool:
        """See the module docstring."""
        return bool(self.error) or self.tokens != self.wanted

    @property
    def e2e_s(self) -> float:
        """End to end."""
        return self.ttft_s + sum(self.itls_s)

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first."""
        return sum(self.itls_s) / max(1, self.tokens - 1)

    def good(self, slo: Slo) -> bool:
        """Did it keep the objectives?"""
        return not self.failed and self.ttft_s <= slo.ttft_s and self.tpot_s <= slo.tpot_s


class Event(msgspec.Struct, frozen=True):
    """Something that the benchmark did, on the same clock as ``Sample.start_s``."""

    what: str
    begin_s: float
    end_s: float


class Run(msgspec.Struct):
    """One workload on one system."""

    system: str
    workload: str
    repeat: int
    samples: list[Sample]
    duration_s: float
    worker_s: float = 0.0
    retried: int = 0
    events: list[Event] = []
    moves: list[MoveRecord] = []
    at_once: int = 0
    note: str = ""
    """Why it is not like the others of the file, for example an older version."""


class Figures(msgspec.Struct, frozen=True):
    """Summary of runs of the same workload on the same system. Times in milliseconds: mean, p50, p99, max."""

    requests: int
    failed: int
    retried: int
    tokens_s: float
    goodput: float
    """Good requests for each second."""
    good_share: float
    ttft: tuple[float, float, float, float]
    tpot: tuple[float, float, float, float]
    itl: tuple[float, float, float, float]
    e2e: tuple[float, float, float, float]
    moves: int
    failed_moves: int
    mb_moved: float
    move_ms: float
    """Median time of a whole move."""
    stall_ms: float
    """Median added stall of a move."""
    worker_s_per_good: float


def four(values: list[float]) -> tuple[float, float, float, float]:
    """Mean, median, p99 and maximum in milliseconds."""
    if not values:
        return (float("nan"),) * 4
    data = 1e3 * np.asarray(values)
    return float(data.mean()), float(np.percentile(data, 50)), float(np.percentile(data, 99)), float(data.max())


def throughput(runs: list[Run]) -> float:
    """Tokens for each second of requests that did not fail, of all runs one after the other."""
    return sum(s.tokens for run in runs for s in run.samples if not s.failed) / sum(run.duration_s for run in runs)


def figures(runs: list[Run], slo: Slo) -> Figures:
    """Of all runs together."""
    samples = [s for run in runs for s in run.samples]
    done = [s for s in samples if not s.failed]
    duration = sum(run.duration_s for run in runs)
    good = sum(s.good(slo) for s in samples)
    moves = [m for run in runs for m in run.moves]
    ok = [m for m in moves if m.ok]
    return Figures(
        requests=len(samples),
        failed=len(samples) - len(done),
        retried=sum(run.retried for run in runs),
        tokens_s=throughput(runs),
        goodput=good / duration,
        good_share=good / max(1, len(samples)),
        ttft=four([s.ttft_s for s in done]),
        tpot=four([s.tpot_s for s in done if s.tokens > 1]),
        itl=four([gap for s in done for gap in s.itls_s]),
        e2e=four([s.e2e_s for s in done]),
        moves=len(ok),
        failed_moves=len(moves) - len(ok),
        mb_moved=sum(m.bytes for m in ok) / 1e6,
        move_ms=four([m.total_s for m in ok])[1],
        stall_ms=four([m.added_stall_s for m in ok])[1],
        worker_s_per_good=sum(run.worker_s for run in runs) / good if good else float("nan"),
    )


def duration(samples: list[Sample]) -> float:
    """First request sent to last chunk received."""
    return max(s.start_s + s.e2e_s for s in samples) - min(s.start_s for s in samples)
