# SPDX-License-Identifier: Apache-2.0
"""The path of each request over workers, for people, reconstructed from successive states.

Workers report the present place of requests and ended moves, but no history. Times are Unix times of this process,
computed from ages. Keeps at most ``_KEPT`` requests. Does no I/O.
"""

from __future__ import annotations

import heapq

import msgspec

from components.engine.protocol import RequestPhase
from components.migration.messages import Mode, MoveRecord, RequestRow
from components.status import Status

_KEPT = 200
_SHOWN = 20
_WINDOW_S = 60.0


class Part(msgspec.Struct, frozen=True):
    """An interval on one worker (decode, prefill), or of a move to it (copying, frozen, replayed)."""

    kind: str
    worker: str
    began: float
    ended: float


class Life(msgspec.Struct, frozen=True):
    """One request."""

    request_id: str
    parts: tuple[Part, ...]
    over: bool


class Lives:
    """See the module docstring."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Part]] = {}
        """The workers of each request, in order."""

    def take(self, status: Status, now: float) -> tuple[Life, ...]:
        """Add the next status. Returns the youngest requests."""
        there: dict[str, tuple[str, RequestRow]] = {
            row.request_id: (worker.worker, row) for worker, row in status.requests()
        }
        youngest = heapq.nsmallest(_KEPT, there, key=lambda name: there[name][1].age_s)
        for name in {*youngest, *(self._parts.keys() & there.keys())}:
            self._see(self._parts.setdefault(name, []), *there[name], now)
        lives = sorted(self._parts.items(), key=lambda pair: -pair[1][0].began)[:_KEPT]
        self._parts = {n: parts for n, parts in lives if n in there or parts[-1].ended >= now - _WINDOW_S}
        shown = list(self._parts)[:_SHOWN]
        moves: dict[str, list[Part]] = {name: [] for name in shown}
        for move in status.moves:
            if move.ok and move.request_id in moves:
                moves[move.request_id] += self._moved(move, now - move.age_s)
        return tuple(Life(name, (*self._parts[name], *moves[name]), name not in there) for name in shown)

    @staticmethod
    def _see(parts: list[Part], worker: str, row: RequestRow, now: float) -> None:
        waits = row.phase in (RequestPhase.WAITING, RequestPhase.PREFILL)
        kind = "prefill" if waits and not row.output_tokens else "decode"
        if parts and (parts[-1].worker, parts[-1].kind) == (worker, kind):
            parts[-1] = msgspec.structs.replace(parts[-1], ended=now)
        else:
            parts.append(Part(kind, worker, parts[-1].ended if parts else now - row.age_s, now))

    def _moved(self, move: MoveRecord, ended: float) -> list[Part]:
        # Two samples are further apart than a move takes: the move's own times are better.
        parts = self._parts[move.request_id]
        for at in range(1, len(parts)):
            before, after = parts[at - 1], parts[at]
            if (before.worker, after.worker) == (move.source, move.target) and before.began < ended < after.ended:
                parts[at - 1] = msgspec.structs.replace(before, ended=ended)
                parts[at] = msgspec.structs.replace(after, began=ended)
        if move.mode is Mode.REPLAY:
            return [Part("replayed", move.target, ended, ended)]
        copying = Part("copying", move.target, ended - move.total_s, ended)
        return [copying, Part("frozen", move.source, ended - move.downtime_s, ended)]
