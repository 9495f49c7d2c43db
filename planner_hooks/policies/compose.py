# SPDX-License-Identifier: Apache-2.0
"""Runs several policies as one: each sees the moves of earlier ones as running.

Every move is checked again against the shared rules; one that breaks a rule is dropped and noted. Workers that a
policy retires count as leaving for later ones, and a worker to or from which earlier ones move is not retired: in
whatever order policies stand, a plan never fills or thins out a worker that it gives up.
"""

from __future__ import annotations

from collections.abc import Sequence

from planner_hooks.ledger import Ledger
from planner_hooks.plan import Hold, HoldReason, Move, Plan
from planner_hooks.policies.base import Policy
from planner_hooks.rules import Rules
from planner_hooks.snapshot import Snapshot


class Composed:
    """Policies in order of precedence."""

    name = "composed"

    def __init__(self, policies: Sequence[Policy], rules: Rules) -> None:
        self.policies = tuple(policies)
        self.rules = rules

    def plan(self, snapshot: Snapshot) -> Plan:
        """See ``Policy``."""
        moves: list[Move] = []
        holds: list[Hold] = []
        retire: list[str] = []
        release: list[str] = []
        for policy in self.policies:
            proposed = policy.plan(snapshot)
            ledger = Ledger(snapshot, self.rules, policy.name)
            accepted = []
            for move in proposed.moves:
                if ledger.move(move.row, snapshot.index[move.dst], move.reason, move.gain_s):
                    accepted.append(move)
            moves += accepted
            used = {worker for move in moves for worker in (move.src, move.dst)}
            holds += [*proposed.holds, *ledger.holds]
            holds += [
                Hold(policy.name, HoldReason.ALREADY_MOVING, worker) for worker in proposed.retire if worker in used
            ]
            leaves = [worker for worker in proposed.retire if worker not in used]
            retire += [worker for worker in leaves if worker not in retire]
            release += [worker for worker in proposed.release if worker not in release]
            snapshot = snapshot.after(accepted, leaves)
        return Plan(tuple(moves), tuple(holds), tuple(retire), tuple(release))
