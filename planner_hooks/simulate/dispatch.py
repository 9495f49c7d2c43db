# SPDX-License-Identifier: Apache-2.0
"""A router's choice of the worker for a new request, without migration.

Round robin, sessions pinned to workers, or Dynamo's KV router: fewest prompt tokens to compute plus fewest active ones.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from enum import StrEnum

import numpy as np

from planner_hooks.simulate.model import WorkerModel
from planner_hooks.simulate.traces import Arrival
from planner_hooks.simulate.worker import Worker


class Dispatch(StrEnum):
    """Choice of the worker for a new request."""

    ROUND_ROBIN = "round-robin"
    STICKY = "sticky"
    KV = "kv"


class Router:
    """See the module docstring. ``reopen`` after every change of the workers."""

    def __init__(self, dispatch: Dispatch, model: WorkerModel) -> None:
        self._dispatch = dispatch
        self._block_tokens = model.prefix_block_tokens
        self._turn = itertools.count()
        self._active = np.zeros(0)
        """Prompt tokens of the unfinished requests of each worker."""
        self._holders: defaultdict[int, set[int]] = defaultdict(set)
        self._workers: Sequence[Worker] = ()
        self.open: list[Worker] = []
        """Workers that get new requests."""
        self._closed = np.zeros(0, dtype=bool)

    def reopen(self, workers: Sequence[Worker], all_workers: Sequence[Worker]) -> None:
        """``workers`` are those that exist now, of all that ever did."""
        self._workers = all_workers
        self._active = np.append(self._active, np.zeros(len(all_workers) - len(self._active)))
        self.open = [worker for worker in workers if not worker.leaving] or list(workers)
        self._closed = np.ones(len(all_workers), dtype=bool)
        self._closed[[worker.key for worker in self.open]] = False

    def count(self, worker: Worker, tokens: int) -> None:
        """Prompt tokens that a worker gets, or, negative, that leave it."""
        self._active[worker.key] += tokens

    def place(self, arrival: Arrival) -> Worker:
        """The worker for a new request."""
        fit = self.open
        if self._dispatch is Dispatch.ROUND_ROBIN:
            return fit[next(self._turn) % len(fit)]
        if self._dispatch is Dispatch.STICKY:
            return fit[(arrival.session * 2654435761 >> 7) % len(fit)]
        return self._least_cost(arrival)

    def _least_cost(self, arrival: Arrival) -> Worker:
        """Dynamo's KV router: prompt tokens still to compute plus active prompt tokens sent there."""
        cost = np.where(self._closed, np.inf, self._active)
        best = int(np.argmin(cost))
        least = cost[best] + arrival.prompt_tokens
        for key in self._holders.get(arrival.prefix[0], ()) if arrival.prefix else ():
            cached = self._workers[key].overlap(arrival) * self._block_tokens
            total = cost[key] + max(1, arrival.prompt_tokens - cached)
            if total < least:
                best, least = key, total
        if arrival.prefix:
            self._holders[arrival.prefix[0]].add(best)
        return self._workers[best]
