# SPDX-License-Identifier: Apache-2.0
"""Workers that end while they have requests, and what becomes of those.

MOVE     they move away with their KV, as this package's workers do
WAIT     the worker gets no new requests and goes on until all have ended
REPLAY   it ends at once; Dynamo's frontend (``--migration-limit``) sends prompt and answer so far to another worker,
         which computes their KV again
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

from planner_hooks.simulate.dispatch import Router
from planner_hooks.simulate.events import Events
from planner_hooks.simulate.moves import Moves
from planner_hooks.simulate.worker import NOT_YET, Request, Worker

_AGAIN_S = 0.1


class Ending(StrEnum):
    """See the module docstring."""

    MOVE = "move"
    WAIT = "wait"
    REPLAY = "replay"


class Upkeep:
    """Ends workers. ``settle`` is called with each one that changes."""

    def __init__(
        self, moves: Moves, router: Router, events: Events, settle: Callable[[Worker], None], ending: Ending
    ) -> None:
        self._moves = moves
        self._router = router
        self._events = events
        self._settle = settle
        self._ending = ending

    def end(self, worker: Worker) -> None:
        """Begin; the router knows that the worker is leaving."""
        worker.advance(self._events.time_s)
        worker.ends, worker.ending_s = True, self._events.time_s
        for request in worker.running:
            request.ended = True
        if self._ending is Ending.MOVE:
            self._drain(worker)
        elif self._ending is Ending.REPLAY:
            for request in worker.drop():
                self._send_again(request)
        self._settle(worker)

    def _drain(self, worker: Worker) -> None:
        """Move requests until it is empty; those without room elsewhere go on decoding meanwhile."""
        if worker.gone_s != NOT_YET or not worker.leaving:
            return
        touched: set[Worker] = set()
        worker.advance(self._events.time_s)
        self._moves.drain(worker, touched)
        for one in touched:
            self._settle(one)
        self._events.after(_AGAIN_S, lambda: self._drain(worker))

    def _send_again(self, request: Request) -> None:
        if request.first_s != NOT_YET:
            request.stalled_since = self._events.time_s
        self._router.free(request)
        worker = self._router.place(request.arrival)
        worker.advance(self._events.time_s)
        worker.enqueue(request)
        self._router.book(request, worker, worker.to_compute(request), request.generated)
        self._settle(worker)
