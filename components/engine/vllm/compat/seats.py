# SPDX-License-Identifier: Apache-2.0
"""Seats in vLLM's batch for requests that are not in ``running``.

vLLM admits up to ``max_num_active_reqs`` requests into ``running``. A frozen request keeps its place in the model
runner, which has ``max_num_seqs`` places, and a reserved one will need a place; both lower that limit.

Threading: the engine core's thread.
"""

from __future__ import annotations

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request


class Seats:
    """See the module docstring."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._limit = scheduler.max_num_active_reqs
        self._held: set[str] = set()

    def left(self) -> int:
        """Number of further requests that could run."""
        taken = len(self._scheduler.running) + self._scheduler.num_waiting_for_streaming_input + len(self._held)
        return self._limit - taken

    def hold(self, request: Request) -> bool:
        """Keep a seat for a request that is not running. False without a free one. Idempotent."""
        if request.request_id not in self._held and self.left() <= 0:
            return False
        self._held.add(request.request_id)
        self._scheduler.max_num_active_reqs = self._limit - len(self._held)
        return True

    def give_up(self, request: Request) -> None:
        """Release its seat. Idempotent."""
        self._held.discard(request.request_id)
        self._scheduler.max_num_active_reqs = self._limit - len(self._held)
