# SPDX-License-Identifier: Apache-2.0
"""Keys of files for earlier versions, which had a router: an error for each, with the new key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from components.errors import ConfigError

_ROUTER = {
    "local-prefill-max-tokens": "Dynamo's router decides: Frontend.frontend-args: {router-conditional-disagg: true}",
    "placement": "Frontend.router-mode (kv, least-loaded, round-robin)",
    "max-migrations-per-worker": "limits.max-moves-per-worker of the planner's policy file",
    "max-migrations-per-pair": "limits.max-moves-per-pair of the planner's policy file",
    "max-precopy-rounds": "nothing: workers bound their rounds themselves",
    "migration-mode": "--mode of dynamo migrate, for each move",
    "step-deadline-s": "nothing: workers bound each step themselves",
    "output-channels": "nothing: tokens go from the worker to the frontend",
    "silence-s": "nothing: Dynamo's frontend notices lost workers",
    "busy-s": "nothing: Dynamo's frontend notices lost workers",
    "replay-limit": "Frontend.migration-limit",
}


def check(*given: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ``ConfigError`` for the first key of a router."""
    for values in given:
        for key in values.get("Router", {}):
            place = _ROUTER.get(key, "Frontend: Dynamo's own router chooses workers")
            raise ConfigError(f"Router.{key}: graphs have no Router any more; in its place: {place}")
        if "Router" in values:
            raise ConfigError("Router: graphs have no Router any more; leave it out, Dynamo's is part of Frontend")
