# SPDX-License-Identifier: Apache-2.0
"""The path of each request over workers, for people, reconstructed from successive states.

Workers report the present place of requests and ended moves, but no history. Times are Unix times of this process,
computed from ages. Keeps at most ``_KEPT`` requests. Does no I/O.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

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


@dataclass
class _Followed:
    parts: list[Part] = field(default_factory=list)
    moves: list[Part] = field(default_factory=list)
    over: bool = False

    @property
    def began(self) -> float:
        return self.parts[0].began


class Lives:
    """See the module docstring."""

    def __init__(self) -> None:
        self._followed: dict[str, _Followed] = {}
        self._noted: dict[tuple[str, str, str, int], None] = {}

    def take(self, status: Status, now: float) -> None:
        """Add the next status."""
        there: dict[str, tuple[str, RequestRow]] = {
            row.request_id: (worker.worker, row) for worker, row in status.requests()
        }
        youngest = heapq.nsmallest(_KEPT, there, key=lambda name: there[name][1].age_s)
        for name in {*youngest, *(self._followed.keys() & there.keys())}:
            self._see(name, *there[name], now)
        for name, followed in self._followed.items():
            followed.over = name not in there
        for move in status.moves:
            self._note(move, now)
        old = [n for n, f in self._followed.items() if f.over and f.parts[-1].ended < now - _WINDOW_S]
        old += heapq.nsmallest(len(self._followed) - _KEPT, self._followed, key=lambda n: self._followed[n].began)
        for name in old:
            self._followed.pop(name, None)

    def _see(self, name: str, worker: str, row: RequestRow, now: float) -> None:
        waits = row.phase in (RequestPhase.WAITING, RequestPhase.PREFILL)
        kind = "prefill" if waits and not row.output_tokens else "decode"
        parts = self._followed.setdefault(name, _Followed()).parts
        if parts and (parts[-1].worker, parts[-1].kind) == (worker, kind):
            parts[-1] = msgspec.structs.replace(parts[-1], ended=now)
            return
        began = parts[-1].ended if parts else now - row.age_s
        parts.append(Part(kind, worker, began, now))

    def _note(self, move: MoveRecord, now: float) -> None:
        key = (move.request_id, move.source, move.target, move.tokens)
        followed = self._followed.get(move.request_id)
        if followed is None or not move.ok or key in self._noted:
            return
        self._noted[key] = None
        while len(self._noted) > 10 * _KEPT:
            del self._noted[next(iter(self._noted))]
        ended = now - move.age_s
        if move.mode is Mode.REPLAY:
            followed.moves.append(Part("replayed", move.target, ended, ended))
        else:
            followed.moves.append(Part("copying", move.target, ended - move.total_s, ended))
            followed.moves.append(Part("frozen", move.source, ended - move.downtime_s, ended))
        # Two samples are further apart than a move takes: the move's own times are better.
        parts = followed.parts
        for at in range(1, len(parts)):
            before, after = parts[at - 1], parts[at]
            if (before.worker, after.worker) == (move.source, move.target) and before.began < ended < after.ended:
                parts[at - 1] = msgspec.structs.replace(before, ended=ended)
                parts[at] = msgspec.structs.replace(after, began=ended)

    def shown(self) -> tuple[Life, ...]:
        """The youngest requests."""
        youngest = heapq.nlargest(_SHOWN, self._followed.items(), key=lambda pair: pair[1].began)
        return tuple(Life(name, (*f.parts, *f.moves), f.over) for name, f in youngest)
