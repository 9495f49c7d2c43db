# SPDX-License-Identifier: Apache-2.0
"""A worker's table of requests with versions, so that callers get differences.

It asks the engine at most once a second, for any number of callers. After the first table no answer waits longer than
``_PATIENCE_S`` for the engine: it then has older data, with their age. Each table of the engine is a version. A caller
with an older version gets whole rows for new and changed requests, counts for requests that only made tokens, and the
numbers of removed rows; a caller with a version that is too old, or of another process, gets everything.

Errors: those of the engine. Threading: one asyncio loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass

import msgspec

from components.engine.kv import RequestId
from components.engine.protocol import EngineStats, RequestInfo, RequestPhase
from components.errors import WorkerLost
from components.migration.legs import Arrival, Handler, Leg
from components.migration.messages import Counts, RequestRow
from components.migration.peers import short
from components.migration.requests import Requests

PAGE = 2048
"""Most rows of one answer."""
_FRESH_S = 1.0
_PATIENCE_S = 0.5
_GONE = 8192
"""Removed rows that are remembered for callers with an older version."""


@dataclass
class _Kept:
    row: RequestRow
    changed: int
    """Version of the last change of anything but counts."""
    counted: int
    """Version of the last change of its counts."""


@dataclass(frozen=True)
class Page:
    """A part of the difference between two versions."""

    whole: bool
    rows: tuple[RequestRow, ...]
    counts: Counts
    gone: tuple[int, ...]
    next: int


class Report:
    """See the module docstring."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self.clock: Callable[[], float] = time.monotonic
        self._kept: dict[str, _Kept] = {}
        """Rows by the request's name in the engine."""
        self._gone: deque[tuple[int, int]] = deque()
        """(version, number of the row)"""
        self._floor = 0
        """Oldest version for which removed rows are known."""
        self._last_number = 0
        self._asking: asyncio.Task[None] | None = None
        self._stats: EngineStats | None = None
        self._told_at = 0.0
        self.version = 0

    async def refresh(self) -> EngineStats:
        """Update the table; the engine's load. Not older than a second, unless the engine is late."""
        if self._asking is None and (self._stats is None or self.age_s() >= _FRESH_S):
            self._asking = asyncio.ensure_future(self._ask())
        if (asking := self._asking) is not None:
            await asyncio.wait((asking,), timeout=None if self._stats is None else _PATIENCE_S)
            if asking.done():
                asking.result()
        if self._stats is None:
            raise WorkerLost("the engine has told nothing about itself")
        return self._stats

    @property
    def stats(self) -> EngineStats | None:
        """The engine's last load."""
        return self._stats

    def blocks_of(self, engine_id: str) -> int:
        """KV blocks of a request in the last table, of all groups; 0 when it is not there."""
        kept = self._kept.get(engine_id)
        return 0 if kept is None else kept.row.kv_blocks

    def age_s(self) -> float:
        """Age of the engine's table."""
        return self.clock() - self._told_at

    async def _ask(self) -> None:
        try:
            stats, table = await self._requests.engine.report()
            self._stats, self._told_at = stats, self.clock()
            self._take(list(self._rows(table)))
        finally:
            self._asking = None

    def _take(self, rows: list[tuple[str, RequestRow]]) -> None:
        self.version += 1
        before, self._kept = self._kept, {}
        for key, row in rows:
            old = before.pop(key, None)
            if old is None:
                self._last_number += 1
                row.number = self._last_number
                self._kept[key] = _Kept(row, self.version, self.version)
                continue
            row.number = old.row.number
            counts = (row.output_tokens, row.kv_blocks) != (old.row.output_tokens, old.row.kv_blocks)
            self._kept[key] = _Kept(
                row,
                self.version if _facts(row) != _facts(old.row) else old.changed,
                self.version if counts else old.counted,
            )
        self._gone.extend((self.version, old.row.number) for old in before.values())
        while len(self._gone) > _GONE:
            self._floor = self._gone.popleft()[0]

    def page(self, since: int, after: int = 0) -> Page:
        """Changes after version ``since``, from the row behind ``after`` on."""
        whole = not self._floor <= since <= self.version or since == 0
        since = 0 if whole else since
        rows: list[RequestRow] = []
        counts: list[tuple[int, int, int]] = []
        last = 0
        # Rows are numbered in order of arrival; a row keeps its number when its order in the engine changes.
        for kept in sorted(self._kept.values(), key=lambda kept: kept.row.number):
            number = kept.row.number
            if number <= after or max(kept.changed, kept.counted) <= since:
                continue
            if len(rows) + len(counts) == PAGE:
                return Page(whole, tuple(rows), Counts.of(counts), self._gone_since(since, after), last)
            if kept.changed > since:
                age = kept.row.age_s + self.age_s()
                rows.append(msgspec.structs.replace(kept.row, age_s=age))
            else:
                counts.append((number, kept.row.output_tokens, kept.row.kv_blocks))
            last = number
        return Page(whole, tuple(rows), Counts.of(counts), self._gone_since(since, after), 0)

    def _gone_since(self, since: int, after: int) -> tuple[int, ...]:
        return tuple(number for version, number in self._gone if version > since) if since and not after else ()

    def _rows(self, table: list[RequestInfo]) -> Iterator[tuple[str, RequestRow]]:
        legs: dict[str, Leg] = {leg.engine_id: leg for leg in lives(self._requests)}
        for info in _without_samples(table, legs):
            leg = legs.pop(info.request_id, None)
            row = RequestRow(
                0,
                info.request_id if leg is None else leg.request_id,
                info.phase,
                info.prompt_tokens,
                info.output_tokens,
                info.kv_blocks,
                info.age_s,
                info.priority,
                info.max_tokens,
                info.preemptions,
                info.not_migratable or "",
            )
            if leg is not None:
                row.not_migratable = leg.fixed
                row.life = leg.life
                row.attached = not isinstance(leg, Arrival) or leg.unread_since is None
                row.moving = leg.lock.locked()
                row.moves = leg.moves
            yield info.request_id, row
        for key, leg in legs.items():
            if relays(leg):
                yield key, self._relayed(leg)

    def _relayed(self, leg: Leg) -> RequestRow:
        away = leg.away
        return RequestRow(
            0,
            leg.request_id,
            RequestPhase.DECODE,
            prompt_tokens=len(leg.prompt_token_ids),
            output_tokens=len(away.cut) if away is not None else 0,
            age_s=time.monotonic() - leg.began,
            max_tokens=leg.max_tokens,
            life=leg.life,
            relayed_from=short(away.owner.instance) if away is not None else "",
            moves=leg.moves,
        )


def _without_samples(table: Iterable[RequestInfo], legs: Container[str]) -> Iterator[RequestInfo]:
    """The engine's table, with the samples of a request (``n`` > 1; vLLM's ``0_ID``, ``1_ID``) as one row."""
    samples: dict[str, RequestInfo] = {}
    for info in table:
        parent = RequestId(info.request_id.partition("_")[2])
        if info.request_id in legs or parent not in legs:
            yield info
        elif (one := samples.get(parent)) is None:
            samples[parent] = msgspec.structs.replace(info, request_id=parent)
        else:
            samples[parent] = msgspec.structs.replace(
                one,
                output_tokens=one.output_tokens + info.output_tokens,
                kv_blocks=one.kv_blocks + info.kv_blocks,
                preemptions=one.preemptions + info.preemptions,
            )
    yield from samples.values()


def lives(requests: Requests) -> list[Leg]:
    """All lives of requests on this worker."""
    return [*requests.legs.values(), *requests.arrivals.lives.values()]


def relays(leg: Leg) -> bool:
    """True when this worker relays another worker's tokens."""
    return leg.away is not None and leg.handler is Handler.SERVES and not leg.over


def _facts(row: RequestRow) -> tuple[object, ...]:
    """A row without the fields that change with every step."""
    return (
        *(row.phase, row.prompt_tokens, row.priority, row.max_tokens, row.preemptions, row.not_migratable),
        *(row.life, row.relayed_from, row.attached, row.moving, row.moves),
    )
