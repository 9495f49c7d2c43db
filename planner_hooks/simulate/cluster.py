# SPDX-License-Identifier: Apache-2.0
"""One cluster: arrivals are dispatched, workers run, the planner ticks, workers come and go.

Policies get the columns of the live system, and a plan is carried out as by workers. A leaving worker moves its movable
requests away by itself.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np

from planner_hooks.estimate import RemainingEstimate
from planner_hooks.plan import Plan
from planner_hooks.policies.base import Policy
from planner_hooks.policies.consolidate import emptying_cost
from planner_hooks.rules import ScaleDownRules
from planner_hooks.scaledown import ScaleDown
from planner_hooks.simulate.columns import columns
from planner_hooks.simulate.dispatch import Dispatch, Router
from planner_hooks.simulate.events import Events
from planner_hooks.simulate.model import WorkerModel
from planner_hooks.simulate.moves import Moves
from planner_hooks.simulate.scaling import Autoscaler, Change, Scaling
from planner_hooks.simulate.traces import Arrival
from planner_hooks.simulate.upkeep import Ending, Upkeep
from planner_hooks.simulate.worker import Request, Worker
from planner_hooks.snapshot import Snapshot

_STARTUP_S = 60.0
"""Time until a restarted worker serves."""


class Cluster:
    """One run. ``policy`` None: nothing moves; ``scale_down`` None: reductions pass at once."""

    def __init__(
        self,
        model: WorkerModel,
        workers: int,
        dispatch: Dispatch = Dispatch.KV,
        policy: Policy | None = None,
        scaling: Scaling | None = None,
        tick_s: float = 1.0,
        scale_down: ScaleDownRules | None = None,
        ending: Ending = Ending.MOVE,
    ) -> None:
        self.model = model
        self.workers: list[Worker] = []
        self.all_workers: list[Worker] = []
        self.finished: list[Request] = []
        self.rejected = 0
        self.decision_s: list[float] = []
        self._events = Events()
        self._holders: defaultdict[int, set[int]] = defaultdict(set)
        self._router = Router(dispatch, model, self._holders)
        self.moves = Moves(model, self._router, self._events, self._settle)
        self._upkeep = Upkeep(self.moves, self._router, self._events, self._settle, ending)
        self._policy = policy
        self._scaling = scaling
        self._tick_s = tick_s
        self._plugin: ScaleDown | None = None
        self._unneeded = 0
        """Workers that policies would retire."""
        if scaling is not None and scale_down is not None:
            bounds = (scaling.min_workers, scaling.max_workers)
            self._plugin = ScaleDown(scale_down, bounds, lambda: self.time_s, workers)
        self._restarting = False
        self._old: list[Worker] = []
        """Workers that a restart has not reached."""
        self._numbers = itertools.count()
        self._remaining = RemainingEstimate()
        self._unfinished = 0
        for _ in range(workers):
            self._add_worker()

    @property
    def time_s(self) -> float:
        """Now."""
        return self._events.time_s

    # Requests

    def run(self, arrivals: Sequence[Arrival], drain_limit_s: float = 600.0) -> None:
        """Simulate until all requests have ended, or ``drain_limit_s`` after the last arrival."""
        feed = iter(arrivals)
        self._unfinished = len(arrivals)
        self._feed(feed)
        end = arrivals[-1].time_s + drain_limit_s
        if self._policy is not None:
            self._events.at(self._tick_s, self._tick)
        if self._scaling is not None:
            scaler = Autoscaler(self._scaling)
            self._events.at(self._scaling.interval_s, lambda: self._scale(scaler))
        self._events.run(end, lambda: self._unfinished > 0)
        for worker in self.workers:
            worker.gone_s = min(worker.gone_s, self.time_s)

    def _load(self) -> float:
        """KV in use and queued, in capacities of one worker."""
        return sum(worker.held + worker.queued_tokens() for worker in self.workers) / self.model.capacity_tokens

    def _feed(self, feed: Iterator[Arrival]) -> None:
        arrival = next(feed, None)
        if arrival is None:
            return

        def arrive() -> None:
            self._arrive(arrival)
            self._feed(feed)

        self._events.at(arrival.time_s, arrive)

    def _arrive(self, arrival: Arrival) -> None:
        room = int(0.9 * self.model.capacity_tokens) - arrival.prompt_tokens
        if room < 1:
            self.rejected += 1
            self._unfinished -= 1
            return
        arrival = msgspec.structs.replace(arrival, output_tokens=min(arrival.output_tokens, room))
        worker = self._router.place(arrival)
        worker.advance(self.time_s)
        request = Request(next(self._numbers), arrival)
        worker.enqueue(request)
        self._router.book(request, worker, worker.to_compute(request))
        self._changed(worker)

    def _changed(self, worker: Worker) -> None:
        """After an external change: process everything due and schedule the next event."""
        if not worker.running and not worker.prefill:
            worker.settle()
        self._schedule(worker)

    def _schedule(self, worker: Worker) -> None:
        worker.version += 1
        version, due = worker.version, worker.next_event()
        if due is None:
            return

        def happen() -> None:
            if worker.version != version:
                return
            worker.run_to_event()
            self._collect(worker)
            self._schedule(worker)

        self._events.at(max(due, self.time_s), happen)

    def _collect(self, worker: Worker) -> None:
        for request in worker.computed:
            self._router.computed(request)
        worker.computed.clear()
        for request in worker.done:
            self._remaining.finished(request.arrival.output_tokens)
            self._router.free(request)
            self._unfinished -= 1
        self.finished += worker.done
        worker.done.clear()
        if worker.ends and worker.empty and worker in self.workers:
            self._remove(worker)

    # Planner

    def _tick(self) -> None:
        if self._policy is None:
            return
        snapshot, rows = self.snapshot()
        began = time.perf_counter()
        plan = self._policy.plan(snapshot)
        self.decision_s.append(time.perf_counter() - began)
        self._carry_out(plan, rows)
        self._events.after(self._tick_s, self._tick)

    def snapshot(self) -> tuple[Snapshot, list[Request]]:
        """Present columns, and the request of each row."""
        return columns(self.workers, self.time_s, self.model, self._remaining)

    def _carry_out(self, plan: Plan, rows: list[Request]) -> None:
        names = {worker.name: worker for worker in self.workers}
        if self._plugin is not None:
            self._unneeded = len(plan.retire)
        elif plan.retire or plan.release:
            for name in plan.retire:
                names[name].leaving = True
            for name in plan.release:
                names[name].leaving = names[name].ends = False
            self._router.reopen(self.workers, self.all_workers)
            for name in plan.retire:
                self._upkeep.end(names[name])
        touched: set[Worker] = set()
        for move in plan.moves:
            self.moves.begin(move.policy, rows[move.row], names[move.src], names[move.dst], touched)
        for worker in touched:
            self._settle(worker)

    def _settle(self, worker: Worker) -> None:
        self._changed(worker)
        self._collect(worker)

    # Scaling

    def _add_worker(self) -> None:
        worker = Worker(len(self.all_workers), self.model, self.time_s, self._holders)
        self.workers.append(worker)
        self.all_workers.append(worker)
        self._router.reopen(self.workers, self.all_workers)

    def _scale(self, scaler: Autoscaler) -> None:
        change = scaler.decide(self.time_s, self.workers, self._load())
        leaving = [worker for worker in self.workers if worker.leaving]
        if self._plugin is not None:
            change = self._ask_plugin(self._plugin, change, bool(leaving))
        elif change.fewer:
            self._retire_one()
        else:
            for worker in leaving[: change.more]:
                worker.leaving = worker.ends = False
        back = sum(not worker.leaving for worker in leaving)
        start = max(0, min(change.more - back, scaler.rules.max_workers - len(self.workers) - scaler.starting))
        for _ in range(start):
            scaler.starting += 1
            self._events.after(scaler.rules.startup_s, lambda: self._started(scaler))
        self._router.reopen(self.workers, self.all_workers)
        self._events.after(scaler.rules.interval_s, lambda: self._scale(scaler))

    def _ask_plugin(self, plugin: ScaleDown, change: Change, scaling: bool) -> Change:
        """The number that passes, as in the live system: while one worker leaves, the planner decides nothing else."""
        ready = sum(not worker.leaving for worker in self.workers)
        proposed = ready + 1 if change.more else ready - max(change.fewer, self._unneeded)
        bound = plugin.decide(proposed, ready, self.snapshot()[0], scaling)
        if bound.at_most < ready:
            self._retire_one()
        return Change() if scaling else change

    def _remove(self, worker: Worker) -> None:
        self.workers.remove(worker)
        worker.gone_s = self.time_s
        self._router.reopen(self.workers, self.all_workers)
        for block in worker.cached:
            self._holders[block].discard(worker.key)
        if self._restarting:
            self._events.after(_STARTUP_S, self._replaced)

    # Restarts

    def restart(self, start_s: float) -> None:
        """End all workers, a tenth of them at a time (one at least); a new one replaces each."""
        self._old = list(self.workers)
        count = max(1, round(0.1 * len(self._old)))

        def begin() -> None:
            self._restarting = True
            for worker in [self._old.pop(0) for _ in range(count)]:
                self._end(worker)

        self._events.at(start_s, begin)

    def _replaced(self) -> None:
        self._add_worker()
        if self._old:
            self._end(self._old.pop(0))

    def _retire_one(self) -> None:
        snapshot, _ = self.snapshot()
        cost = emptying_cost(snapshot, np.arange(len(self.workers)))
        stay = [i for i, worker in enumerate(self.workers) if not worker.leaving]
        victim = self.workers[min(stay, key=lambda i: float(cost[i]))]
        self._end(victim)

    def _end(self, worker: Worker) -> None:
        worker.leaving = True
        self._router.reopen(self.workers, self.all_workers)
        self._upkeep.end(worker)

    def _started(self, scaler: Autoscaler) -> None:
        scaler.starting -= 1
        self._add_worker()

    def worker_hours(self) -> float:
        """Total lifetime of all workers."""
        return sum((min(w.gone_s, self.time_s) - w.born_s) / 3600 for w in self.all_workers)
