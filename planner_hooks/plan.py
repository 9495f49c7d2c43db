# SPDX-License-Identifier: Apache-2.0
"""What a policy answers: moves to make, workers to retire, and why everything else stays where it is."""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol

import msgspec

from components.migration.messages import Mode
from planner_hooks.snapshot import Snapshot


class HoldReason(StrEnum):
    """Why something was not moved; also a metric label."""

    BALANCED = "balanced"
    """Loads are close enough together, or nothing is hot."""
    NO_CANDIDATE = "no-candidate"
    """No request there may be moved now."""
    NO_DESTINATION = "no-destination"
    """No worker could take it without being overloaded itself."""
    NOT_WORTH = "not-worth"
    """The predicted gain does not exceed the cost of moving."""
    NOT_MIGRATABLE = "not-migratable"
    COOLDOWN = "cooldown"
    NO_RETURN = "no-return"
    """It would go back to the worker that it came from a moment ago."""
    ALREADY_MOVING = "already-moving"
    TICK_LIMIT = "tick-limit"
    WORKER_LIMIT = "worker-limit"
    PAIR_LIMIT = "pair-limit"
    OPPOSITE = "opposite"
    """Something moves between the two workers in the other direction."""
    STALE = "stale"
    """The worker has not reported lately."""
    MISSING = "missing"
    """Workers that there should be are starting, so that there are fewer than there will be."""
    NO_METRICS = "no-metrics"
    """Nothing is known at all."""
    TOO_LARGE = "too-large"
    """The prompt is larger than any worker."""
    MIN_WORKERS = "min-workers"
    WORLD_CHANGED = "world-changed"
    """The request or a worker was not as planned when the move was to begin."""
    DRY_RUN = "dry-run"
    DELAYED = "delayed"
    """A reduction has not been proposed for long enough."""
    SCALING = "scaling"
    """A reduction waits until the number before it has been carried out."""


class Move(msgspec.Struct, frozen=True, omit_defaults=True):
    """One request to another worker. ``gain_s`` and ``cost_s`` are comparable: seconds of a whole worker's time."""

    request_id: str
    src: str
    dst: str
    policy: str
    reason: str
    gain_s: float = 0.0
    cost_s: float = 0.0
    mode: Mode = Mode.LIVE
    tokens: int = 0
    row: int = 0
    """Row of the request in the snapshot that was planned on."""


class Hold(msgspec.Struct, frozen=True, omit_defaults=True):
    """Something that a policy looked at and left alone."""

    policy: str
    reason: HoldReason
    worker: str = ""
    request_id: str = ""
    detail: str = ""


class Plan(msgspec.Struct, frozen=True, omit_defaults=True):
    """The outcome of one decision."""

    moves: tuple[Move, ...] = ()
    holds: tuple[Hold, ...] = ()
    retire: tuple[str, ...] = ()
    """Workers that the others could do without. Where the planner decides their number, it is asked for fewer; where
    it does not, they get no new requests and are drained."""
    release: tuple[str, ...] = ()
    """Workers that are leaving and are needed again; only those that a plan retired follow this."""


class Policy(Protocol):
    """A policy is one pure function: same snapshot, same plan."""

    name: str

    def plan(self, snapshot: Snapshot) -> Plan:
        """Decide. Must not change the snapshot, keep state, read clocks or do I/O."""
        ...
