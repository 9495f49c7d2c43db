# SPDX-License-Identifier: Apache-2.0
"""Clusters for policy tests: built by hand or by hypothesis, with instant migrations."""

from __future__ import annotations

import msgspec
from hypothesis import strategies as st

from components.engine.protocol import RequestPhase
from planner_hooks.plan import Plan
from planner_hooks.snapshot import NEVER_S, Capture, RequestView, WorkerView

CAPACITY = 10_000


def request(name: str, worker: str, tokens: int, **more: object) -> RequestView:
    """A running request with much left to do."""
    values: dict[str, object] = {
        "phase": RequestPhase.DECODE,
        "need_tokens": tokens,
        "kv_tokens": tokens,
        "remaining_tokens": 500.0,
    }
    values |= more
    if values["phase"] is not RequestPhase.DECODE:
        values["kv_tokens"] = 0
    return RequestView(name, worker, **values)  # type: ignore[arg-type]


def cluster(requests: list[RequestView], workers: dict[str, dict[str, object]] | int = 2) -> Capture:
    """Workers whose sums follow from their requests."""
    options = {f"w{i}": {} for i in range(workers)} if isinstance(workers, int) else workers
    return refreshed(
        Capture(
            time_s=0.0,
            workers=tuple(
                WorkerView(name, CAPACITY, max_seqs=64, kv_bytes_per_token=1000, **more)  # type: ignore[arg-type]
                for name, more in options.items()
            ),
            requests=tuple(requests),
        )
    )


def refreshed(capture: Capture) -> Capture:
    """Worker sums recomputed."""
    views = []
    for worker in capture.workers:
        mine = [r for r in capture.requests if r.worker == worker.worker]
        running = [r for r in mine if r.phase is RequestPhase.DECODE]
        waiting = [r for r in mine if r.phase is not RequestPhase.DECODE]
        held = sum(r.kv_tokens for r in running)
        views.append(
            msgspec.structs.replace(
                worker,
                held_tokens=held,
                queued_tokens=sum(r.need_tokens for r in waiting),
                running=len(running),
                waiting=len(waiting),
                step_s=0.01 + 0.0005 * len(running) + 2e-6 * held if running else 0.0,
            )
        )
    return msgspec.structs.replace(capture, workers=tuple(views))


def settled(capture: Capture, plan: Plan) -> Capture:
    """The plan carried out; requests may be moved again at once, which is harder than reality."""
    target = {move.request_id: move.dst for move in plan.moves}
    requests = tuple(
        msgspec.structs.replace(r, worker=target.get(r.request_id, r.worker), since_move_s=NEVER_S)
        for r in capture.requests
    )
    workers = tuple(
        msgspec.structs.replace(w, draining=(w.draining or w.worker in plan.retire) and w.worker not in plan.release)
        for w in capture.workers
    )
    return refreshed(msgspec.structs.replace(capture, workers=workers, requests=requests))


@st.composite
def captures(draw: st.DrawFn) -> Capture:
    """Up to 8 workers and 80 requests of all kinds."""
    count = draw(st.integers(1, 8))
    names = [f"w{i}" for i in range(count)]
    workers: dict[str, dict[str, object]] = {
        name: {
            "draining": draw(st.sampled_from([False, False, False, True])),
            "report_age_s": draw(st.sampled_from([0.0, 0.0, 0.0, 0.0, 99.0])),
        }
        for name in names
    }
    free = dict.fromkeys(names, CAPACITY)
    requests = []
    for i in range(draw(st.integers(0, 80))):
        worker = draw(st.sampled_from(names if draw(st.booleans()) else names[:1]))
        tokens = draw(st.integers(16, 4000))
        phase = RequestPhase.DECODE if free[worker] >= tokens else RequestPhase.WAITING
        if phase is RequestPhase.DECODE:
            free[worker] -= tokens
        requests.append(
            request(
                f"r{i}",
                worker,
                tokens,
                phase=phase,
                remaining_tokens=float(draw(st.integers(0, 3000))),
                priority=draw(st.sampled_from([0, 0, 0, 1, 2])),
                not_migratable=draw(st.sampled_from([None, None, None, "guided decoding"])),
                moving=draw(st.sampled_from([False, False, False, True])),
                since_move_s=draw(st.sampled_from([0.0, 20.0, NEVER_S])),
                came_from=draw(st.sampled_from(["", *names])),
            )
        )
    return cluster(requests, workers)
