# SPDX-License-Identifier: Apache-2.0
"""A plan as people see it in ``dynamo top`` and on the web page, who ask for it at the planner's ``decisions``."""

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
    """Moves first, then what is left alone and why; not more than people can read."""
    moves = [Decision(m.policy, Verdict.MOVE, m.reason, m.request_id, m.src, m.dst) for m in plan.moves]
    retired = [Decision("", Verdict.RETIRE, "the others could do without it", "", w) for w in plan.retire]
    left = [
        Decision(h.policy, Verdict.LEAVE, f"{h.reason} {h.detail}".strip(), h.request_id, h.worker) for h in plan.holds
    ]
    return tuple((moves + retired + left)[:MAX_DECISIONS])


class Board:
    """The last moves and retirements, and what the last plan left alone."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._done: deque[tuple[float, Decision]] = deque(maxlen=MAX_DECISIONS // 2)
        self._left: tuple[tuple[float, Decision], ...] = ()

    def take(self, plan: Plan) -> None:
        """The planner has decided this now."""
        now = self._clock()
        found = [(now, decision) for decision in decisions(plan)]
        self._done.extend(pair for pair in found if pair[1].verdict is not Verdict.LEAVE)
        left = [pair for pair in found if pair[1].verdict is Verdict.LEAVE]
        self._left = tuple(left[: MAX_DECISIONS - len(self._done)])

    def shown(self) -> tuple[Decision, ...]:
        """All of them, with their age."""
        now = self._clock()
        return tuple(msgspec.structs.replace(d, age_s=now - at) for at, d in (*self._done, *self._left))

    async def serve(self, _: Any) -> AsyncIterator[dict[str, str]]:
        """Dynamo's handler of the endpoint."""
        yield pack(PlannerReply(self.shown()))
