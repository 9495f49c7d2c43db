# SPDX-License-Identifier: Apache-2.0
"""The columns of simulated workers, as policies get them of live ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from planner_hooks.estimate import RemainingEstimate
from planner_hooks.simulate.model import WorkerModel
from planner_hooks.simulate.worker import Request, Worker
from planner_hooks.snapshot import Snapshot


def columns(
    workers: list[Worker], time_s: float, model: WorkerModel, remaining: RemainingEstimate
) -> tuple[Snapshot, list[Request]]:
    """Present columns, and the request of each row. Advances the workers to this time."""
    rows: list[Request] = []
    owner: list[int] = []
    for i, worker in enumerate(workers):
        worker.advance(time_s)
        rows += worker.running
        rows += worker.waiting
        owner += [i] * (len(worker.running) + len(worker.waiting))
    index = {worker: i for i, worker in enumerate(workers)}
    count = len(workers)
    runs = np.array([r.worker is not None and r in r.worker.running for r in rows], dtype=bool)
    generated = np.array([workers[o].generated(r) for r, o in zip(rows, owner, strict=True)], dtype=float)
    need = generated + np.array([r.arrival.prompt_tokens for r in rows], dtype=float)
    queued = np.bincount(np.array(owner, dtype=int)[~runs], weights=need[~runs], minlength=count).astype(float)

    def column(values: Sequence[float]) -> np.ndarray:
        return np.array(values, dtype=float)

    snapshot = Snapshot(
        time_s=time_s,
        worker_ids=tuple(w.name for w in workers),
        w_capacity=np.full(count, float(model.capacity_tokens)),
        w_held=column([w.held for w in workers]),
        w_queued=queued,
        w_running=column([len(w.running) + len(w.prefill) for w in workers]),
        w_waiting=column([len(w.waiting) for w in workers]),
        w_max_seqs=np.full(count, float(model.max_seqs)),
        w_step_s=column([w.mean_step_s() for w in workers]),
        w_fresh=np.ones(count, dtype=bool),
        w_leaving=np.array([w.leaving for w in workers], dtype=bool),
        w_inbound=np.zeros(count),
        w_outbound=column([sum(r.need for r in w.running if r.moving) if w.moves else 0.0 for w in workers]),
        w_moves=np.array([w.moves for w in workers], dtype=np.int32),
        request_ids=rows,  # type: ignore[arg-type]
        r_worker=np.array(owner, dtype=np.int32),
        r_kv=np.where(runs, need, 0.0),
        r_need=need,
        r_remaining=remaining.of(generated),
        r_priority=np.array([r.arrival.priority for r in rows], dtype=np.int32),
        r_running=runs,
        r_waiting=~runs,
        r_free=np.array([not r.moving for r in rows], dtype=bool),
        r_since_move=time_s - column([r.last_move_s for r in rows]),
        r_came_from=np.array([index.get(r.came_from, count) if r.moved else count for r in rows], dtype=np.int32),  # type: ignore[arg-type]
        bytes_per_token=float(model.kv_bytes_per_token),
        bytes_per_s=model.bytes_per_s,
        overhead_s=model.overhead_s,
        downtime_s=model.downtime_s,
        pairs=Counter(
            (index[r.worker], index[r.target])  # type: ignore[index]
            for w in workers
            if w.moves
            for r in w.running
            if r.moving and r.target in index
        ),
    )
    return snapshot, rows
