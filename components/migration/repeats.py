# SPDX-License-Identifier: Apache-2.0
"""When a worker ends its stream of a request that has left, so that the frontend sends the request again.

Threading: one asyncio loop.
"""

from __future__ import annotations

import time

from components.migration.legs import Away, Leg
from components.migration.options import Options
from components.migration.owners import TELL_AGAIN_S, Owners
from components.migration.peers import Peers
from components.migration.tasks import Spawn

_LOOK_S = 0.05


class Repeat(Exception):
    """Asks the frontend to send the request again; no error."""


class Repeats:
    """See the module docstring."""

    def __init__(self, peers: Peers, owners: Owners, spawn: Spawn, options: Options) -> None:
        self._peers = peers
        self._owners = owners
        self._spawn = spawn
        self._options = options

    def due(self, leg: Leg, away: Away, made: int, closing: bool) -> bool:
        """True when the frontend is to repeat it now. ``closing``: this process is about to end.

        It never gives a request to a worker twice, and fails the request when it has nobody to give it to. So one
        worker that it has not tried is kept for the loss of the owner, unless this process is about to end. Only
        workers count that have just answered: discovery goes on listing a dead one.
        """
        if not self._options.repeats or leg.attached or away.told is None:
            return False
        now = time.monotonic()
        if now < away.look_at and not closing:
            # To ask Dynamo for its workers with each token costs as much as to pass the token on.
            return False
        away.look_at = now + _LOOK_S
        untried = {instance for instance in self._peers.siblings() if instance not in leg.tried}
        if not closing:
            enough = leg.max_tokens is None or leg.max_tokens - made >= self._options.relay_below
            if not enough or len(untried) < 2 or away.owner.instance not in untried:
                return False
        if now - away.told_at < TELL_AGAIN_S:
            return self._owners.known_to(untried, away.told)
        away.told = None
        self._spawn(self._owners.tell(leg.request_id, away))
        return False
