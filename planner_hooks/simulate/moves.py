# SPDX-License-Identifier: Apache-2.0
"""Migrations in simulated time: reserve at the destination, copy while the source decodes, cut over, release."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from planner_hooks.simulate.dispatch import Router
from planner_hooks.simulate.events import Events
from planner_hooks.simulate.model import WorkerModel
from planner_hooks.simulate.worker import NOT_YET, Request, Worker


class Moves:
    """Moves of one run. ``settle`` is called with each worker that a cut-over has changed."""

    def __init__(self, model: WorkerModel, router: Router, events: Events, settle: Callable[[Worker], None]) -> None:
        self.failed = 0
        self.bytes_moved = 0
        self.by_policy: Counter[str] = Counter()
        self._model = model
        self._router = router
        self._events = events
        self._settle = settle
        self._next_commit: dict[Worker, float] = {}
        """Hand-overs of one worker follow one another."""

    def drain(self, worker: Worker, touched: set[Worker]) -> None:
        """Move waiting requests first; each goes to the worker with most room, if any."""
        stays = [request for request in (*worker.waiting, *worker.running) if not request.moving]
        others = [other for other in self._router.open if other is not worker]
        for request in stays[: max(0, self._model.moves - worker.moves)] if others else []:
            target = min(others, key=lambda other: other.held + other.queued_tokens())
            if self._fits(target, target.queued_tokens() + _need(request, worker)):
                self.begin("drain", request, worker, target, touched)

    def begin(self, policy: str, request: Request, src: Worker, dst: Worker, touched: set[Worker]) -> None:
        """A waiting request moves at once, a running one after its copy. ``touched`` gets the workers that changed."""
        if request in src.waiting:
            src.remove(request)
            self._arrived(request, src, dst, policy)
            dst.enqueue(request)
            touched |= {src, dst}
            return
        need = _need(request, src)
        if not self._fits(dst, need):
            self.failed += 1
            return
        dst.reserved += need
        request.moving, request.target = True, dst
        for worker in (src, dst):
            worker.moves += 1
        touched |= {src, dst}
        sharing = max(src.moves, dst.moves)
        takes = self._model.overhead_s + need * self._model.kv_bytes_per_token * sharing / self._model.bytes_per_s
        now = self._events.time_s
        at = max(now + takes, *(self._next_commit.get(worker, 0.0) for worker in (src, dst)))
        for worker in (src, dst):
            self._next_commit[worker] = at + self._model.commit_s
        epoch = request.epoch
        self._events.at(
            at, lambda: self._at_boundary(src, lambda: self._cut_over(policy, request, src, dst, need, epoch))
        )

    def _at_boundary(self, worker: Worker, act: Callable[[], None]) -> None:
        """A request leaves a batch, and joins one, between two steps."""
        worker.advance(self._events.time_s)
        self._events.at(
            self._events.time_s if self._model.free_moves else max(self._events.time_s, worker.boundary()), act
        )

    def _fits(self, worker: Worker, tokens: int) -> bool:
        return worker.held + tokens <= (1.0 - self._model.watermark) * self._model.capacity_tokens

    def _cut_over(self, policy: str, request: Request, src: Worker, dst: Worker, reserved: int, epoch: int) -> None:
        src.advance(self._events.time_s)
        dst.advance(self._events.time_s)
        request.moving = False
        need = _need(request, src)
        lost = request.epoch != epoch or request.worker is not src or request not in src.running
        if lost or dst.held - reserved + need > self._model.capacity_tokens or dst.gone_s <= self._events.time_s:
            dst.reserved -= reserved
            self.failed += 1
            self._end(src, dst)
            return
        src.remove(request)
        dst.reserved += need - reserved
        request.stalled_since = self._events.time_s
        self.bytes_moved += need * self._model.kv_bytes_per_token
        self._arrived(request, src, dst, policy)
        request.worker = dst

        def join() -> None:
            dst.advance(self._events.time_s)
            dst.reserved -= need
            dst.land(request)
            self._end(src, dst)

        others = min(src.moves, self._model.freezes) - 1
        pause_s = self._model.downtime_s + others * self._model.crowd_pause_s
        self._events.after(pause_s, lambda: self._at_boundary(dst, join))

    def _end(self, src: Worker, dst: Worker) -> None:
        for worker in (src, dst):
            worker.moves -= 1
            self._settle(worker)

    def _arrived(self, request: Request, src: Worker, dst: Worker, policy: str) -> None:
        waits = request.first_s == NOT_YET
        self._router.moved(request, dst, dst.to_compute(request) if waits else 0, request.generated)
        self.by_policy[policy] += 1
        request.moved += 1
        request.came_from, request.last_move_s = src, self._events.time_s


def _need(request: Request, worker: Worker) -> int:
    return request.arrival.prompt_tokens + worker.generated(request)
