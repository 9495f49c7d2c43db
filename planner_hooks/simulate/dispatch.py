# SPDX-License-Identifier: Apache-2.0
"""A router's choice of the worker for a new request: Dynamo's KV routing, or round robin.

KV routing has the cost function of Dynamo 1.6's ``KvRouter`` with its default weights, in tokens: prompt tokens that
the worker has still to compute, those of this request that it has not cached included, plus prompt tokens in use there
with this request. Blocks of a prefix in use count once. Answers do not count (``router_track_output_blocks`` is off).
A test compares the choices with those of Dynamo's own selector.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence
from enum import StrEnum

import numpy as np

from planner_hooks.simulate.model import WorkerModel
from planner_hooks.simulate.traces import Arrival
from planner_hooks.simulate.worker import Request, Worker


class Dispatch(StrEnum):
    """Choice of the worker for a new request."""

    ROUND_ROBIN = "round-robin"
    KV = "kv"


class Router:
    """See the module docstring. ``reopen`` after every change of the workers."""

    def __init__(self, dispatch: Dispatch, model: WorkerModel, holders: defaultdict[int, set[int]]) -> None:
        self._dispatch = dispatch
        self._block = model.prefix_block_tokens
        self._relays = model.relays
        self._turn = itertools.count()
        self._holders = holders
        self._used = np.zeros(0)
        """Prompt tokens in use on each worker."""
        self._to_compute = np.zeros(0)
        self._prefixes: list[Counter[int]] = []
        """Blocks of known prefixes in use on each worker."""
        self._booked: dict[Request, tuple[int, int, int]] = {}
        """(worker, tokens in use, tokens to compute) of each request."""
        self.open: list[Worker] = []
        """Workers that get new requests."""
        self._all: Sequence[Worker] = ()
        self._closed = np.zeros(0, dtype=bool)

    def reopen(self, workers: Sequence[Worker], all_workers: Sequence[Worker]) -> None:
        """``workers`` are those that exist now, of all that ever did."""
        new = len(all_workers) - len(self._used)
        self._used = np.append(self._used, np.zeros(new))
        self._to_compute = np.append(self._to_compute, np.zeros(new))
        self._prefixes += [Counter() for _ in range(new)]
        self._all = all_workers
        self.open = [worker for worker in workers if not worker.leaving] or list(workers)
        self._closed = np.ones(len(all_workers), dtype=bool)
        self._closed[[worker.key for worker in self.open]] = False

    def place(self, arrival: Arrival) -> Worker:
        """The worker for a new request."""
        if self._dispatch is Dispatch.ROUND_ROBIN:
            return self.open[next(self._turn) % len(self.open)]
        cost = np.where(self._closed, np.inf, self._to_compute + self._used)
        cached, shared = self._known(arrival)
        for key in set(cached) | set(shared):
            tokens = min(cached.get(key, 0) * self._block, arrival.prompt_tokens)
            cost[key] -= tokens + min(shared.get(key, 0) * self._block, arrival.prompt_tokens)
        return self._all[int(np.argmin(cost))]

    def _known(self, arrival: Arrival) -> tuple[dict[int, int], dict[int, int]]:
        """Leading blocks that each worker has cached, and blocks that it has in use."""
        cached: dict[int, int] = {}
        shared: Counter[int] = Counter()
        here: set[int] = set()
        for number, block in enumerate(arrival.prefix):
            holders = self._holders.get(block, ())
            here = set(holders) if number == 0 else here & set(holders)
            if not here:
                break
            for key in here:
                cached[key] = number + 1
                shared[key] += block in self._prefixes[key]
        return cached, shared

    def book(self, request: Request, worker: Worker, to_compute: int, generated: int = 0) -> None:
        """Count a request on the worker that it was sent to."""
        tokens = request.arrival.prompt_tokens + generated
        blocks = self._prefixes[worker.key]
        for block in request.arrival.prefix:
            tokens -= self._block if block in blocks else 0
            blocks[block] += 1
        self._booked[request] = worker.key, max(0, tokens), to_compute
        self._used[worker.key] += max(0, tokens)
        self._to_compute[worker.key] += to_compute

    def computed(self, request: Request) -> None:
        """Note the first token of a request."""
        if request in self._booked:
            key, tokens, to_compute = self._booked[request]
            self._to_compute[key] -= to_compute
            self._booked[request] = key, tokens, 0

    def free(self, request: Request) -> None:
        """Note the end of a request, or its move to another worker."""
        key, tokens, to_compute = self._booked.pop(request)
        self._used[key] -= tokens
        self._to_compute[key] -= to_compute
        blocks = self._prefixes[key]
        for block in request.arrival.prefix:
            blocks[block] -= 1
            if not blocks[block]:
                del blocks[block]

    def moved(self, request: Request, worker: Worker, to_compute: int, generated: int) -> None:
        """The frontend has repeated it on another worker, which counts its answer so far; or it relays unaware."""
        if not self._relays:
            self.free(request)
            self.book(request, worker, to_compute, generated)
