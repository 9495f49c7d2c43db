# SPDX-License-Identifier: Apache-2.0
"""A plan as people see it in ``dynamo top`` and on the web page. Pure."""

from __future__ import annotations

from components.messages import Decision, Verdict
from planner_hooks.plan import Plan

MAX_DECISIONS = 200


def decisions(plan: Plan, at: float) -> tuple[Decision, ...]:
    """Moves first, then what is left alone and why; never more than a router takes."""
    moves = [Decision(at, m.policy, Verdict.MOVE, m.reason, m.request_id, m.src, m.dst) for m in plan.moves]
    retired = [Decision(at, "", Verdict.RETIRE, "gets no new requests and is emptied", "", w) for w in plan.retire]
    left = [
        Decision(at, h.policy, Verdict.LEAVE, f"{h.reason} {h.detail}".strip(), h.request_id, h.worker)
        for h in plan.holds
    ]
    return tuple((moves + retired + left)[:MAX_DECISIONS])
