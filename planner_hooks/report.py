# SPDX-License-Identifier: Apache-2.0
"""A planner's last decisions for ``dynamo top`` and the web page (endpoint ``decisions``)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec

from components.messages import pack
from components.migration.messages import Decision, PlannerReply, Verdict
from planner_hooks.plan import Plan

MAX_DECISIONS = 200


def decisions(plan: Plan) -> tuple[Decision, ...]:
    """Moves first, then holds with their reasons, as many as people can read."""
    moves = [Decision(m.policy, Verdict.MOVE, m.reason, m.request_id, m.src, m.dst) for m in plan.moves]
    retired = [Decision("", Verdict.RETIRE, "the others could do without it", "", w) for w in plan.retire]
    left = [
        Decision(h.policy, Verdict.LEAVE, f"{h.reason} {h.detail}".strip(), h.request_id, h.worker) for h in plan.holds
    ]
    return tuple((moves + retired + left)[:MAX_DECISIONS])


class Board:
    """The last moves and retirements, and the holds of the last plan."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._done: deque[tuple[float, Decision]] = deque(maxlen=MAX_DECISIONS // 2)
        self._left: tuple[tuple[float, Decision], ...] = ()

    def take(self, plan: Plan) -> None:
        """Add a plan."""
        now = self._clock()
        found = [(now, decision) for decision in decisions(plan)]
        self._done.extend(pair for pair in found if pair[1].verdict is not Verdict.LEAVE)
        left = [pair for pair in found if pair[1].verdict is Verdict.LEAVE]
        self._left = tuple(left[: MAX_DECISIONS - len(self._done)])

    def shown(self) -> tuple[Decision, ...]:
        """All decisions with their ages."""
        now = self._clock()
        return tuple(msgspec.structs.replace(d, age_s=now - at) for at, d in (*self._done, *self._left))

    async def serve(self, _: Any) -> AsyncIterator[dict[str, str]]:
        """Dynamo's handler of the endpoint."""
        yield pack(PlannerReply(self.shown()))
