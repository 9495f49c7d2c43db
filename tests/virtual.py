# SPDX-License-Identifier: Apache-2.0
"""Virtual time, the states that a session passes, and what may become of a call; see ``tests.streams``."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Coroutine
from enum import StrEnum
from typing import Any

from components.migration.messages import WorkerOp
from tests.faults import clock
from tests.faults.agent import VirtualAgent
from tests.faults.agent import Wire as Lane

LEASE_S = 0.3


def virtual(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test in virtual time, without waiting and in deterministic order."""

    @functools.wraps(test)
    def run(*args: Any, **keywords: Any) -> None:
        clock.run(test(*args, **keywords))

    return run


def virtual_agents(seed: int = 0) -> Callable[[Any], Any]:
    """For ``Cluster.start``: transfer agents of one cluster without threads."""
    lane = Lane()
    lane.chance, lane.piece_s = random.Random(seed), 5e-5
    return lambda config: VirtualAgent(lane, config)


class Fate(StrEnum):
    """Fate of a call. A stream of an ``attach`` breaks with any but the first."""

    NORMAL = "normal"
    TWICE = "double"
    LATE = "late"
    LOST = "lost"
    LOST_ANSWER = "lost answer"
    GIVEN_UP = "given up"
    """It arrives long after its caller's time-out."""
    KILL_BEFORE = "kill host before"
    KILL_AFTER = "kill host after"
    KILL_CALLER = "kill caller"


GIVEN_UP_S, HANDLED_S = 0.3, 1.1
FATAL_ITEM = 4


class State(StrEnum):
    """Last event of a session. ``ASKED``: the callee does not know yet."""

    RESERVE_ASKED = "reserve asked"
    RESERVED = "reserved"
    ATTACHED = "attached"
    COPYING = "copying"
    EXTENDED = "extended"
    FREEZE_ASKED = "freeze asked"
    FROZEN = "frozen"
    COMMIT_ASKED = "commit asked"
    COMMITTED = "committed"
    FIRST_TOKEN = "first token"
    RELEASED = "released"
    RELAYED = "relayed"
    TELLING = "telling"
    TOLD = "told"
    REPEATED = "repeated"
    ADOPTED = "adopted"
    PASSED_ON = "passed on"
    TAKING_BACK = "taking back"
    RESUMED = "resumed"


ASKED = {
    WorkerOp.RESERVE: State.RESERVE_ASKED,
    WorkerOp.COMMIT: State.COMMIT_ASKED,
    WorkerOp.OWNERS: State.TELLING,
    WorkerOp.ABORT: State.TAKING_BACK,
}
OBEYED = {
    WorkerOp.RESERVE: State.RESERVED,
    WorkerOp.LANDING: State.COPYING,
    WorkerOp.EXTEND: State.EXTENDED,
    WorkerOp.COMMIT: State.COMMITTED,
    WorkerOp.OWNERS: State.TOLD,
}
