# SPDX-License-Identifier: Apache-2.0
"""The state of all workers as a client knows it, kept up to date by differences.

``Told`` follows one worker. A worker that does not answer keeps its last state, with the age and the reason: it does
not count as empty. Ages use the clock of this process alone. Does no I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from components.engine.protocol import EngineInfo, EngineStats, RequestPhase
from components.migration.messages import Counts, Decision, MoveRecord, RequestRow, WorkerState


class WorkerReport(msgspec.Struct, frozen=True):
    """One worker."""

    worker: str
    """Last eight digits of its instance id."""
    role: str = ""
    missing: str = ""
    """Why it has not answered; empty: it has. If missing, all other fields are as old as ``age_s``."""
    age_s: float = 0.0
    """Age of this report."""
    info: EngineInfo | None = None
    stats: EngineStats | None = None
    requests: tuple[RequestRow, ...] = ()
    cordoned: bool = False
    draining: bool = False
    tokens_total: int = 0
    metrics: str = ""
    """host:port of its Prometheus metrics."""
    handoffs: dict[str, int] = {}
    """Hand-offs from prefill to decode workers, by outcome."""

    def here(self) -> list[RequestRow]:
        """Requests in its engine, running or waiting; without relayed and landing ones."""
        return [row for row in self.requests if not row.relayed_from and row.phase is not RequestPhase.LANDING]


class Status(msgspec.Struct, frozen=True):
    """The whole system."""

    workers: tuple[WorkerReport, ...] = ()
    moves: tuple[MoveRecord, ...] = ()
    """The last moves, in the order of their ends."""
    decisions: tuple[Decision, ...] = ()
    """The last decisions of planners."""

    def requests(self) -> Iterable[tuple[WorkerReport, RequestRow]]:
        """Every request with its worker."""
        return ((worker, row) for worker in self.workers for row in worker.here())


class Told:
    """The state of one worker. ``take`` gets its pages in order; ``report`` returns the known state."""

    def __init__(self, worker: str) -> None:
        self.worker = worker
        self.missing = "it has not been asked"
        self.version = 0
        self.moves_total = 0
        self._next_version = 0
        self._state: WorkerState | None = None
        self._info: EngineInfo | None = None
        self._at = 0.0
        self._rows: dict[int, RequestRow] = {}
        self._began: dict[int, float] = {}

    def take(self, state: WorkerState, now: float, first: bool) -> None:
        """Add a page of an answer received at ``now``."""
        if first:
            self._state, self._at, self.moves_total = state, now - state.age_s, state.moves_total
            self._info = state.info or self._info
            self._next_version = state.version
        left = () if not first else None if state.whole else state.gone
        self._change(left, state.rows, state.counts, now)
        if not state.next:
            self.version, self.missing = self._next_version, ""

    @property
    def told_at(self) -> float | None:
        """Time of the known state; None without one."""
        return None if self._state is None else self._at

    def _change(self, left: Sequence[int] | None, rows: Sequence[RequestRow], counts: Counts, now: float) -> None:
        """Drop the rows with these numbers (None: all), add or replace some, and count what others have made."""
        for number in tuple(self._rows) if left is None else left:
            self._rows.pop(number, None)
            self._began.pop(number, None)
        for row in rows:
            self._rows[row.number] = row
            self._began[row.number] = now - row.age_s
        for number, output_tokens, kv_blocks in counts:
            if (known := self._rows.get(number)) is not None:
                known.output_tokens, known.kv_blocks = output_tokens, kv_blocks

    def report(self, now: float, ages: bool) -> WorkerReport:
        """The known state. ``ages``: update those of the requests, which takes time for very many."""
        if ages:
            for number, row in self._rows.items():
                row.age_s = now - self._began[number]
        return self.head(now, tuple(self._rows.values()))

    def head(self, now: float, requests: tuple[RequestRow, ...] = ()) -> WorkerReport:
        """The same with these requests."""
        state = self._state
        if state is None:
            return WorkerReport(self.worker, missing=self.missing)
        return WorkerReport(
            self.worker,
            state.role,
            self.missing,
            now - self._at,
            self._info,
            state.stats,
            requests,
            state.cordoned,
            state.draining,
            state.tokens_total,
            state.metrics,
            state.handoffs,
        )
