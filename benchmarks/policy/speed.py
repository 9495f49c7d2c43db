# SPDX-License-Identifier: Apache-2.0
"""How long one decision of all policies takes, by cluster size, on one core.

``capture`` is the cost of turning the readable views into columns, which the live observer pays once per tick as
well; the simulator builds columns directly.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec
import numpy as np

from components.engine.protocol import RequestPhase
from planner_hooks.config import parse
from planner_hooks.snapshot import Capture, RequestView, Snapshot, WorkerView

SIZES = ((4, 400), (16, 1600), (64, 6400), (256, 25_000), (1024, 100_000))


class Speed(msgspec.Struct, frozen=True):
    """Medians and the slowest of one size, in milliseconds."""

    workers: int
    requests: int
    moves: int
    decision_ms: float
    decision_max_ms: float
    capture_ms: float


def cluster(workers: int, requests: int, seed: int = 0) -> Capture:
    """Skewed load with queues, important requests and one leaving worker: every policy has work to do."""
    rng = np.random.default_rng(seed)
    weights = rng.pareto(3.0, workers) + 0.5
    places = rng.choice(workers, requests, p=weights / weights.sum())
    sizes = np.minimum(rng.pareto(1.5, requests) * 400 + 64, 16_000).astype(int)
    capacity = int(1.4 * sizes.sum() / workers)
    held, rows = np.zeros(workers, dtype=int), []
    for i, (worker, tokens) in enumerate(zip(places.tolist(), sizes.tolist(), strict=True)):
        runs = held[worker] + tokens <= capacity
        held[worker] += tokens if runs else 0
        rows.append(
            RequestView(
                request_id=f"r{i}",
                worker=f"w{worker}",
                phase=RequestPhase.DECODE if runs else RequestPhase.WAITING,
                need_tokens=tokens,
                kv_tokens=tokens if runs else 0,
                remaining_tokens=float(tokens),
                priority=int(i % 50 == 0),
            )
        )
    running = np.bincount([int(r.worker[1:]) for r in rows if r.kv_tokens], minlength=workers)
    waiting = np.bincount(places, minlength=workers) - running
    queued = np.bincount(places, weights=sizes, minlength=workers) - held
    views = [
        WorkerView(
            worker=f"w{i}",
            capacity_tokens=capacity,
            held_tokens=int(held[i]),
            queued_tokens=int(queued[i]),
            running=int(running[i]),
            waiting=int(waiting[i]),
            max_seqs=512,
            step_s=0.008 + 1e-4 * int(running[i]) + 1.5e-7 * int(held[i]),
            draining=i == 1,
            kv_bytes_per_token=131_072,
        )
        for i in range(workers)
    ]
    return Capture(0.0, tuple(views), tuple(rows), bytes_per_s=10e9)


def timed(call: Callable[[], object], repeat: int) -> list[float]:
    """Milliseconds of each call."""
    found = []
    for _ in range(repeat):
        began = time.perf_counter()
        call()
        found.append(1e3 * (time.perf_counter() - began))
    return found


def measure(repeat: int = 15) -> list[Speed]:
    """One row for each size. Columns are sorted anew for each decision, as they are in a new snapshot."""
    policy = parse({}).build()
    rows = []
    for workers, requests in SIZES:
        capture = cluster(workers, requests)
        snapshot = Snapshot.of(capture)

        def decide(snapshot: Snapshot = snapshot) -> None:
            fresh = {name: getattr(snapshot, name) for name in Snapshot.__dataclass_fields__ if name != "by_worker"}
            policy.plan(Snapshot(**fresh))

        decide()
        took = timed(decide, repeat)
        moves = len(policy.plan(snapshot).moves)
        capture_ms = float(np.median(timed(lambda capture=capture: Snapshot.of(capture), 3)))  # type: ignore[misc]
        rows.append(Speed(workers, requests, moves, float(np.median(took)), max(took), capture_ms))
    return rows
