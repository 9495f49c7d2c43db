# SPDX-License-Identifier: Apache-2.0
"""How long one decision of all policies takes, by cluster size, on one core, and what a live tick spends before it.

``decision`` is what a policy file costs: from a snapshot to a plan. A live tick first decodes what workers have told
since the last one (``decode``; here every request has gone on by a token) and makes columns of it (``observe``).
``tick`` is all of it, with the calls that begin the moves, but without a network; ``turnover`` is a tick for which each
worker has one request in twenty replaced by a new one.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import msgspec
import numpy as np

from components.client import Drained
from components.engine.kv import RequestId
from components.engine.protocol import EngineInfo, EngineStats, RequestPhase
from components.messages import pack, unpack
from components.migration.messages import Counts, Mode, MoveRecord, RequestRow, WorkerReply, WorkerState
from planner_hooks.config import parse
from planner_hooks.controller import Controller
from planner_hooks.observe import Observer
from planner_hooks.rules import Cost
from planner_hooks.snapshot import Capture, RequestView, Snapshot, WorkerView
from planner_hooks.table import Table

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


def answers(capture: Capture, first: bool) -> dict[str, dict[str, str]]:
    """The same state as workers tell it, packed: everything, or that every request has gone on."""
    rows: defaultdict[str, list[RequestRow]] = defaultdict(list)
    for number, r in enumerate(capture.requests, 1):
        blocks = r.kv_tokens // _BLOCK
        row = RequestRow(number, RequestId(r.request_id), r.phase, r.need_tokens, 0, blocks, 1.0, -r.priority)
        rows[r.worker].append(row)
    found = {}
    for w in capture.workers:
        counts = Counts.of([(row.number, 1, row.kv_blocks) for row in rows[w.worker]])
        state = WorkerState(
            w.worker,
            "decode",
            EngineStats(
                running=w.running,
                waiting=w.waiting,
                frozen=0,
                landing=0,
                free_blocks=(w.capacity_tokens - w.held_tokens) // _BLOCK,
                total_blocks=w.capacity_tokens // _BLOCK,
                queued_prefill_tokens=w.queued_tokens,
                step_s=w.step_s,
            ),
            info=EngineInfo("m", "f", _BLOCK, w.capacity_tokens // _BLOCK, 16_384, w.max_seqs, 8192, (), (), 131_072)
            if first
            else None,
            version=1 if first else 2,
            whole=first,
            rows=tuple(rows[w.worker]) if first else (),
            counts=Counts() if first else counts,
            cordoned=w.draining,
            draining=w.draining,
        )
        found[w.worker] = pack(WorkerReply(state=state))
    return found


def take(told: dict[str, Table], packed: dict[str, dict[str, str]]) -> None:
    """What ``components.client.Workers`` does with the answers of one tick."""
    for worker, message in packed.items():
        state = unpack(message, WorkerReply).state
        if state is not None:
            told[worker].take(state, time.monotonic(), first=True)


class _Commands:
    """What the controller asks of ``components.client.Workers``, with nothing behind it."""

    def __init__(self, told: dict[str, Table], packed: dict[str, dict[str, str]]) -> None:
        self._told = told
        self.packed = packed

    async def refresh(self, patience_s: float) -> None:
        take(self._told, self.packed)

    def tables(self) -> list[Table]:
        return list(self._told.values())

    def moves(self) -> tuple[MoveRecord, ...]:
        return ()

    async def migrate(self, request_id: str, source: str, target: str, mode: Mode, life: int) -> MoveRecord:
        return MoveRecord(RequestId(request_id), source, target, mode, ok=True)

    async def drain(self, worker: str, timeout_s: float) -> Drained:
        return Drained(worker, 0, ())

    async def undrain(self, worker: str) -> None:
        """Nothing."""


def replaced(packed: dict[str, dict[str, str]], tables: dict[str, Table], version: int) -> dict[str, dict[str, str]]:
    """What workers tell when one request in twenty has ended and another one has come, and the rest has gone on."""
    found = {}
    for name, table in tables.items():
        count, last = math.ceil(len(table.rows) / 20), max((row.number for row in table.rows), default=0)
        new = (
            RequestRow(last + n, RequestId(f"{name}.{last + n}"), RequestPhase.DECODE, 500) for n in range(1, count + 1)
        )
        going_on = [(row.number, version, row.kv_blocks) for row in table.rows[count:]]
        state = unpack(packed[name], WorkerReply).state
        if state is None:
            continue
        state = msgspec.structs.replace(
            state,
            version=version,
            gone=tuple(row.number for row in table.rows[:count]),
            rows=tuple(new),
            counts=Counts.of(going_on),
        )
        found[name] = pack(WorkerReply(state=state))
    return found


def ticks(capture: Capture, told: dict[str, Table], repeat: int, turnover: bool = False) -> list[float]:
    """Milliseconds of processor time of whole ticks."""

    async def one() -> list[float]:
        commands, found = _Commands(told, answers(capture, first=False)), []
        controller = Controller(parse({}), commands, Observer(Cost()))
        for version in range(3, 4 + repeat):
            commands.packed = replaced(commands.packed, told, version) if turnover else commands.packed
            began = time.process_time()
            await controller.tick()
            await controller.idle()
            found.append(1e3 * (time.process_time() - began))
        return found[1:]  # The first one learns all names.

    return asyncio.run(one())


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
        told, observer = {w.worker: Table(w.worker) for w in capture.workers}, Observer(Cost())
        take(told, answers(capture, first=True))
        decode = timed(partial(take, told, answers(capture, first=False)), 3)
        # The first one learns all names.
        tables = list(told.values())

        def see(tables: list[Table] = tables, observer: Observer = observer) -> None:
            observer.snapshot(observer.look(tables, ()), 5.0)

        observe = timed(see, 4)[1:]
        tick, turnover = ticks(capture, told, 3), ticks(capture, told, 3, turnover=True)
        others = (float(np.median(times)) for times in (observe, decode, tick, turnover))
        rows.append(Speed(workers, requests, moves, float(np.median(took)), max(took), *others))
    return rows
