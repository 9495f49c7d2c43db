# SPDX-License-Identifier: Apache-2.0
"""How long one decision of all policies takes, by cluster size, on one core, and what a live tick spends beside it.

``decision`` is what a policy file costs: from a snapshot to a plan. A live tick first decodes what workers have told
since the last one (``decode``; here every request has gone on by a token) and makes columns of it (``observe``).
``tick`` is all of it, with the calls to workers before and after it, but without a network; ``turnover`` is a tick for
which each worker has one request in twenty replaced by a new one.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import cast

import msgspec
import numpy as np

from components.engine.kv import RequestId
from components.engine.protocol import EngineInfo, EngineStats, RequestPhase
from components.messages import pack, unpack
from components.migration.messages import Counts, MoveRecord, RequestRow, WorkerCall, WorkerOp, WorkerReply, WorkerState
from components.migration.peers import Peers, short
from planner_hooks.config import parse
from planner_hooks.controller import Controller
from planner_hooks.observe import Observer
from planner_hooks.rules import Cost
from planner_hooks.snapshot import Capture, RequestView, Snapshot, WorkerView
from planner_hooks.table import Table, Tables

_BLOCK = 16
SIZES = ((4, 400), (16, 1600), (64, 6400), (256, 25_000), (1024, 100_000))


class Speed(msgspec.Struct, frozen=True):
    """Medians and the slowest of one size, in milliseconds."""

    workers: int
    requests: int
    moves: int
    decision_ms: float
    decision_max_ms: float
    observe_ms: float
    decode_ms: float
    tick_ms: float
    turnover_ms: float = 0.0


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
                worker=short(worker),
                phase=RequestPhase.DECODE if runs else RequestPhase.WAITING,
                need_tokens=tokens,
                kv_tokens=tokens if runs else 0,
                remaining_tokens=float(tokens),
                priority=int(i % 50 == 0),
            )
        )
    running = np.bincount([int(r.worker, 16) for r in rows if r.kv_tokens], minlength=workers)
    waiting = np.bincount(places, minlength=workers) - running
    queued = np.bincount(places, weights=sizes, minlength=workers) - held
    views = [
        WorkerView(
            worker=short(i),
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


class Fleet:
    """``Peers`` without a network: workers with the requests of a capture, which go on by a token for each answer."""

    def __init__(self, capture: Capture) -> None:
        self._views = capture.workers
        self._rows: defaultdict[str, list[RequestRow]] = defaultdict(list)
        for number, r in enumerate(capture.requests, 1):
            blocks = r.kv_tokens // _BLOCK
            row = RequestRow(number, RequestId(r.request_id), r.phase, r.need_tokens, 0, blocks, 1.0, -r.priority)
            self._rows[r.worker].append(row)
        self._version = 1
        self.packed = [pack(self._told(w, (), self._rows[w.worker], ())) for w in capture.workers]

    def go_on(self, share: float = 0.0) -> None:
        """Make the next answers; this share of the requests has ended, and as many have come."""
        self._version += 1
        self.packed = []
        for view in self._views:
            rows = self._rows[view.worker]
            count, last = math.ceil(share * len(rows)), rows[-1].number if rows else 0
            gone, rows = [row.number for row in rows[:count]], rows[count:]
            names = [(last + n, RequestId(f"{view.worker}.{last + n}")) for n in range(1, count + 1)]
            new = [RequestRow(number, name, RequestPhase.DECODE, 500) for number, name in names]
            counts = [(row.number, self._version, row.kv_blocks) for row in rows]
            self._rows[view.worker] = rows + new
            self.packed.append(pack(self._told(view, gone, new, counts)))

    def _told(
        self, w: WorkerView, gone: Sequence[int], rows: Sequence[RequestRow], counts: Sequence[tuple[int, int, int]]
    ) -> WorkerReply:
        first, blocks = self._version == 1, w.capacity_tokens // _BLOCK
        stats = EngineStats(
            *(w.running, w.waiting, 0, 0, (w.capacity_tokens - w.held_tokens) // _BLOCK, blocks),
            queued_prefill_tokens=w.queued_tokens,
            step_s=w.step_s,
        )
        state = WorkerState(
            *(w.worker, "decode", stats),
            info=EngineInfo("m", "f", _BLOCK, blocks, 16_384, w.max_seqs, 8192, (), (), 131_072) if first else None,
            version=self._version,
            whole=first,
            rows=tuple(rows),
            counts=Counts.of(counts) if counts else Counts(),
            gone=tuple(gone),
            cordoned=w.draining,
            draining=w.draining,
        )
        return WorkerReply(state=state)

    def instances(self) -> list[int]:
        return list(range(len(self._views)))

    async def call(self, instance: int, call: WorkerCall, timeout_s: float = 20.0) -> WorkerReply:
        if call.op is WorkerOp.STATUS:
            return unpack(self.packed[instance], WorkerReply)
        names = self._views[instance].worker, self._views[call.target].worker
        return WorkerReply(moves=(MoveRecord(RequestId(call.request_id), *names, call.mode, ok=True),))


def ticks(capture: Capture, repeat: int, share: float = 0.0) -> list[float]:
    """Milliseconds of processor time of whole ticks, each of which sees this share of the requests replaced."""

    async def one() -> list[float]:
        fleet, found = Fleet(capture), []
        controller = Controller(parse({}), Tables(cast(Peers, fleet)), Observer(Cost()))
        for _ in range(1 + repeat):
            began = time.process_time()
            await controller.tick()
            await controller.idle()
            found.append(1e3 * (time.process_time() - began))
            fleet.go_on(share)
        return found[1:]  # The first one learns all names.

    return asyncio.run(one())


def parts(capture: Capture, repeat: int) -> tuple[list[float], list[float]]:
    """Milliseconds of decoding and of observing in ticks in which every request has gone on by a token."""
    fleet, observer = Fleet(capture), Observer(Cost())
    tables = [Table(w.worker) for w in capture.workers]

    def take() -> None:
        for table, message in zip(tables, fleet.packed, strict=True):
            if (state := unpack(message, WorkerReply).state) is not None:
                table.take(state, time.monotonic(), first=True)

    def see() -> None:
        observer.snapshot(observer.look(tables, ()), 5.0)

    decode, observe = [], []
    for _ in range(1 + repeat):
        decode += timed(take, 1)
        observe += timed(see, 1)
        fleet.go_on()
    return decode[1:], observe[1:]  # The first one learns all names.


def timed(call: Callable[[], object], repeat: int) -> list[float]:
    """Milliseconds of processor time of each call: other work on the machine does not count."""
    found = []
    for _ in range(repeat):
        began = time.thread_time()
        call()
        found.append(1e3 * (time.thread_time() - began))
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
        decode, observe = parts(capture, 3)
        tick, turnover = ticks(capture, 3), ticks(capture, 3, share=0.05)
        others = (float(np.median(times)) for times in (observe, decode, tick, turnover))
        rows.append(Speed(workers, requests, moves, float(np.median(took)), max(took), *others))
    return rows
