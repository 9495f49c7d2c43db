# SPDX-License-Identifier: Apache-2.0
"""Requests of workers as columns, kept up to date by what the workers tell.

A hundred thousand requests that only made tokens cost a copy for each worker, and no look at any of them. ``Tables`` is
the client of all workers with one ``Table`` for each. ``columns`` and ``rows`` belong together and are replaced when
requests come or go; known requests change in place, so that another thread may read a pair that it has taken.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from components.client import Workers
from components.engine.protocol import RequestPhase
from components.migration.messages import Column, Counts, RequestRow
from components.status import Told
from planner_hooks.snapshot import WAITS

RECORD = np.dtype(
    [
        *((name, "i8") for name in ("number", "output_tokens", "kv_blocks", "prompt_tokens", "priority")),
        ("max_tokens", "f8"),
        *((name, "?") for name in ("running", "waiting", "free", "elsewhere")),
    ]
)
"""Columns of a table. ``elsewhere``: the request is not in this engine, or not yet."""
Records = NDArray[np.void]
_MOST = (1 << 31) - 1
"""A client chooses the priority."""


_number = attrgetter("number")


def _record(row: RequestRow) -> tuple[float, ...]:
    return (
        *(row.number, row.output_tokens, row.kv_blocks, row.prompt_tokens),
        max(-_MOST, min(_MOST, row.priority)),
        np.nan if row.max_tokens is None else row.max_tokens,
        row.phase is RequestPhase.DECODE,
        row.phase in WAITS,
        not (row.not_migratable or row.moving),
        bool(row.relayed_from) or row.phase is RequestPhase.LANDING,
    )


class Table(Told):
    """One worker."""

    def __init__(self, worker: str) -> None:
        super().__init__(worker)
        self.columns: Records = np.zeros(0, RECORD)
        """In the order of the rows' numbers."""
        self.rows: list[RequestRow] = []
        """In the same order; their counts are those of their last change."""
        self._numbers: list[int] = []
        self._came: list[RequestRow] = []
        self._left: list[RequestRow] = []

    def changes(self) -> tuple[list[RequestRow], list[RequestRow]]:
        """Rows that have come, and rows that have gone with their last counts, since the last call."""
        found = self._came, self._left
        self._came, self._left = [], []
        return found

    def places(self, request_id: str) -> list[int]:
        """Places of a request: more than one when it is relayed to where it came from."""
        return [at for at, row in enumerate(self.rows) if row.request_id == request_id]

    def _change(self, left: Sequence[int], rows: Sequence[RequestRow]) -> None:
        columns, listed, numbers = self.columns, self.rows.copy(), self._numbers
        places = sorted({at for number in left if (at := _place(numbers, number)) is not None}, reverse=True)
        for at in places:
            row = listed.pop(at)
            row.output_tokens, row.kv_blocks = int(columns["output_tokens"][at]), int(columns["kv_blocks"][at])
            self._left.append(row)
            del numbers[at]
        if places:
            keep = np.ones(len(columns), dtype=bool)
            keep[places] = False
            columns = columns[keep]
        new: list[RequestRow] = []
        for row in {row.number: row for row in rows}.values():
            if (at := _place(numbers, row.number)) is None:
                new.append(row)
            else:
                listed[at] = row
                columns[at] = _record(row)
        if new:
            self._came += new
            new.sort(key=_number)
            in_order = not numbers or numbers[-1] < new[0].number
            columns = joined((columns, np.array([_record(row) for row in new], RECORD)))
            listed += new
            numbers += map(_number, new)
            if not in_order:
                columns = columns[np.argsort(columns["number"], kind="stable")]
                listed.sort(key=_number)
                numbers.sort()
        self.columns, self.rows = columns, listed
        super()._change(left, rows)

    def _count(self, counts: Counts) -> None:
        numbers, known = _numbers(counts.numbers), self.columns["number"]
        at: NDArray[np.int64] | slice = slice(None)
        told: NDArray[np.bool_] | slice = slice(None)
        if not np.array_equal(numbers, known):
            at = np.searchsorted(known, numbers)
            told = at < len(known)
            told[told] = known[at[told]] == numbers[told]
            at = at[told]
        self.columns["output_tokens"][at] = _numbers(counts.output_tokens)[told]
        self.columns["kv_blocks"][at] = _numbers(counts.kv_blocks)[told]


def _numbers(column: Column) -> NDArray[np.int64]:
    return np.frombuffer(column.data, f"<u{column.width}").astype(np.int64) + column.lowest


def joined(parts: Sequence[Records]) -> Records:
    """All records. ``np.concatenate`` compares the fields' names and types of every pair."""
    ends = list(itertools.accumulate(map(len, parts), initial=0))
    records = np.empty(ends[-1], RECORD)
    for (begin, end), part in zip(itertools.pairwise(ends), parts, strict=True):
        records[begin:end] = part
    return records


def _place(numbers: list[int], number: int) -> int | None:
    at = bisect.bisect_left(numbers, number)
    return at if at < len(numbers) and numbers[at] == number else None


class Tables(Workers):
    """All workers, for a planner."""

    def follow(self, worker: str) -> Told:
        """See ``Workers``."""
        return Table(worker)

    def tables(self) -> list[Table]:
        """Every worker that is in Dynamo's discovery."""
        return [told for _, told in sorted(self._told.items()) if isinstance(told, Table)]


class Places:
    """The tables that list each request: mostly one. A request that has just moved may be in two."""

    def __init__(self) -> None:
        self._tables: set[Table] = set()
        self._in: dict[str, Table] = {}
        self.several: dict[str, list[Table]] = {}

    def update(self, tables: Sequence[Table]) -> list[RequestRow]:
        """Take all changes; returns rows of requests that have ended.

        A worker that has gone has not told their ends.
        """
        for table in self._tables.difference(tables):
            for row in table.rows:
                self._leave(row.request_id, table)
        ended: list[RequestRow] = []
        for table in tables:
            came, left = table.changes()
            if table not in self._tables:
                came, left = table.rows, []
            for row in left:
                self._leave(row.request_id, table)
            for row in came:
                self._come(row.request_id, table)
            ended += left
        self._tables = set(tables)
        return [row for row in ended if row.request_id not in self._in]

    def of(self, request_id: str) -> Sequence[Table]:
        """Tables with this request."""
        if request_id in self.several:
            return self.several[request_id]
        return (self._in[request_id],) if request_id in self._in else ()

    def _come(self, request_id: str, table: Table) -> None:
        if (other := self._in.get(request_id)) is None:
            self._in[request_id] = table
        else:
            self.several.setdefault(request_id, [other]).append(table)

    def _leave(self, request_id: str, table: Table) -> None:
        others = self.several.get(request_id)
        if others is None:
            self._in.pop(request_id, None)
            return
        others.remove(table)
        self._in[request_id] = others[0]
        if len(others) == 1:
            del self.several[request_id]
