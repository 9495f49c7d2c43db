# SPDX-License-Identifier: Apache-2.0
"""Output of a policy: moves, workers to retire, and reasons why everything else stays."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from components.migration.messages import Mode


class HoldReason(StrEnum):
    """Why something does not move; also a metric label."""

    BALANCED = "balanced"
    """Loads are close together, or no worker is hot."""
    NO_CANDIDATE = "no-candidate"
    """No request there may move now."""
    NO_DESTINATION = "no-destination"
    """Any destination would be overloaded."""
    NOT_WORTH = "not-worth"
    """The predicted gain does not exceed the cost of moving."""
    NOT_MIGRATABLE = "not-migratable"
    COOLDOWN = "cooldown"
    NO_RETURN = "no-return"
    """It would return to the worker that it has just left."""
    ALREADY_MOVING = "already-moving"
    SHARED = "shared"
    """It has most of its KV in common with others on its worker."""
    TICK_LIMIT = "tick-limit"
    WORKER_LIMIT = "worker-limit"
    PAIR_LIMIT = "pair-limit"
    OPPOSITE = "opposite"
    """A request moves between the two workers in the other direction."""
    STALE = "stale"
    """The worker has not reported lately."""
    MISSING = "missing"
    """Expected replicas are still starting."""
    NO_METRICS = "no-metrics"
    """There is no report at all."""
    TOO_LARGE = "too-large"
    """The prompt does not fit any worker."""
    MIN_WORKERS = "min-workers"
    WORLD_CHANGED = "world-changed"
    """Request or worker were no longer as planned at the begin of the move."""
    DRY_RUN = "dry-run"
    DELAYED = "delayed"
    """A reduction has not been proposed for ``delay-s``."""
    SCALING = "scaling"
    """A reduction waits until the previous number has been carried out."""


class Move(msgspec.Struct, frozen=True, omit_defaults=True):
    """Moves one request. ``gain_s`` and ``cost_s`` have the same unit: seconds of a whole worker's time."""

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
    """Row of the request in the plan's snapshot."""


class Hold(msgspec.Struct, frozen=True, omit_defaults=True):
    """Something that a policy considered and left alone."""

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
    """Workers to retire. Where the planner decides their number, it is asked for fewer; otherwise they get no new
    requests and are drained."""
    release: tuple[str, ...] = ()
    """Leaving workers that are needed again; applies only to those that a plan has retired."""
