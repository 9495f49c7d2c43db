# SPDX-License-Identifier: Apache-2.0
"""Requests of all workers as columns, kept up to date by what the workers tell.

``Tables`` is the client of all workers with one ``Table`` for each, which keeps what its worker has told until
``Register.update`` puts that of all of them into columns at once: a hundred thousand requests that only made tokens
cost one copy. Columns and rows change in ``update`` alone, so that another thread may read them until the next one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from components.client import Workers
from components.engine.protocol import RequestPhase
from components.migration.messages import Column, Counts, RequestRow
from components.status import Told
from planner_hooks.snapshot import WAITS

KEY, OUTPUT, BLOCKS, PROMPT, PRIORITY, LIMIT, FLAGS = range(7)
"""Lines of ``Columns``. ``KEY``: a table's number from ``SHIFT`` on, and the row's number on its worker."""
SHIFT = 44
RUNNING, WAITING, FREE, ELSEWHERE = 1, 2, 4, 8
"""Flags. ``ELSEWHERE``: the request is not in this engine, or not yet."""
Columns = NDArray[np.int64]
"""One line for each field, one column for each request, by ascending key."""
_OF_PHASE = {RequestPhase.DECODE: RUNNING, RequestPhase.LANDING: ELSEWHERE} | dict.fromkeys(WAITS, WAITING)
_MASK = (1 << SHIFT) - 1
_MOST = (1 << 31) - 1
"""A client chooses the priority."""
_NO_LIMIT = 1 << 60
"""Tokens."""
_Page = tuple[Sequence[int] | None, Sequence[RequestRow], Counts]
_WIDTHS = {width: np.dtype(f"<u{width}") for width in (1, 2, 4, 8)}


class Table(Told):
    """One worker. Its requests are in a ``Register``, and in none of its reports."""

    def __init__(self, worker: str) -> None:
        super().__init__(worker)
        self._pages: list[_Page] = []

    def take_pages(self) -> list[_Page]:
        """Pages since the last call: numbers of removed rows (None: all), rows, and counts."""
        pages, self._pages = self._pages, []
        return pages

    def _change(self, left: Sequence[int] | None, rows: Sequence[RequestRow], counts: Counts, now: float) -> None:
        self._pages.append((left, rows, counts))


class Tables(Workers):
    """All workers, for a planner."""

    def follow(self, worker: str) -> Told:
        """See ``Workers``."""
        return Table(worker)

    def tables(self) -> list[Table]:
        """Every worker that is in Dynamo's discovery."""
        return [told for told in self._told.values() if isinstance(told, Table)]


class Register:
    """The requests of all tables."""

    def __init__(self) -> None:
        self.columns: Columns = np.zeros((FLAGS + 1, 0), np.int64)
        self.rows: dict[int, RequestRow] = {}
        """By key; their counts are those of their last change."""
        self.several: dict[str, list[int]] = {}
        """Keys of each request that is listed more than once: it has just moved, or is relayed."""
        self._key: dict[str, int] = {}
        self.numbers: dict[Table, int] = {}
        """Of tables."""
        self._next = 0

    def update(self, tables: Sequence[Table]) -> list[int]:
        """Take what workers have reported; returns the output tokens of requests that have ended.

        A lost worker has not reported their ends.
        """
        ended: dict[str, int] = {}
        for table in self.numbers.keys() - set(tables):
            self._leave(self._of(self.numbers.pop(table)))
        for table in tables:
            if table not in self.numbers:
                self.numbers[table], self._next = self._next, self._next + 1
        told = [table.take_pages() for table in tables]
        bases = [self.numbers[table] << SHIFT for table in tables]
        # Mostly one page of each table.
        for turn in itertools.zip_longest(*told):
            pages = {base: page for base, page in zip(bases, turn, strict=True) if page is not None}
            ended |= self._apply(pages)
        return [tokens for request_id, tokens in ended.items() if request_id not in self._key]

    def keys(self, request_id: str) -> Sequence[int]:
        """All of a request."""
        return self.several.get(request_id) or ((self._key[request_id],) if request_id in self._key else ())

    def _of(self, number: int) -> list[int]:
        begin, end = np.searchsorted(self.columns[KEY], [number << SHIFT, number + 1 << SHIFT])
        found: list[int] = self.columns[KEY, begin:end].tolist()
        return found

    def _apply(self, pages: Mapping[int, _Page]) -> dict[str, int]:
        gone: list[int] = []
        rows: dict[int, RequestRow] = {}
        for base, (left, changed, _) in pages.items():
            gone += self._of(base >> SHIFT) if left is None else [base | number & _MASK for number in left]
            for row in changed:
                rows[base | row.number & _MASK] = row
        # A number with another request is another row.
        gone += [key for key in self.rows.keys() & rows.keys() if self.rows[key].request_id != rows[key].request_id]
        ended = self._leave(gone)
        if rows:
            self._come(rows)
        self._count({base: counts for base, (_, _, counts) in pages.items() if len(counts.numbers)})
        return ended

    def _leave(self, gone: Sequence[int]) -> dict[str, int]:
        known = sorted(self.rows.keys() & gone)
        if not known:
            return {}
        at = np.searchsorted(self.columns[KEY], known)
        ended: dict[str, int] = {}
        for key, tokens in zip(known, self.columns[OUTPUT, at].tolist(), strict=True):
            request_id = self.rows.pop(key).request_id
            ended[request_id] = tokens
            if (others := self.several.get(request_id)) is None:
                del self._key[request_id]
                continue
            others.remove(key)
            self._key[request_id] = others[0]
            if len(others) == 1:
                del self.several[request_id]
        self.columns = np.delete(self.columns, at, axis=1)
        return ended

    def _come(self, rows: Mapping[int, RequestRow]) -> None:
        told, keys = _columns(rows), self.columns[KEY]
        at = np.searchsorted(keys, told[KEY])
        known = at < keys.size
        known[known] = keys[at[known]] == told[KEY, known]
        self.columns[:, at[known]] = told[:, known]
        for key, row in rows.items():
            request_id = row.request_id
            if key in self.rows:
                continue
            if request_id in self._key:
                self.several.setdefault(request_id, [self._key[request_id]]).append(key)
            else:
                self._key[request_id] = key
        self.rows |= rows
        joined = np.concatenate([self.columns, told[:, ~known]], axis=1)
        self.columns = joined[:, np.argsort(joined[KEY], kind="stable")]

    def _count(self, counts: Mapping[int, Counts]) -> None:
        keys = self.columns[KEY]
        if not counts or not keys.size:
            return
        numbers = [c.numbers for c in counts.values()]
        told = np.repeat(np.fromiter(counts, np.int64), list(map(len, numbers))) | _joined(numbers) & _MASK
        output = _joined([c.output_tokens for c in counts.values()])
        blocks = _joined([c.kv_blocks for c in counts.values()])
        if not np.array_equal(keys, told):
            at = np.searchsorted(keys[:-1], told)
            known = keys[at] == told
            self.columns[OUTPUT, at[known]], self.columns[BLOCKS, at[known]] = output[known], blocks[known]
        else:
            self.columns[OUTPUT], self.columns[BLOCKS] = output, blocks


def _columns(rows: Mapping[int, RequestRow]) -> Columns:
    values = [
        (
            key,
            row.output_tokens,
            row.kv_blocks,
            row.prompt_tokens,
            max(-_MOST, min(_MOST, row.priority)),
            _NO_LIMIT if row.max_tokens is None else min(_NO_LIMIT, row.max_tokens),
            _OF_PHASE.get(row.phase, 0)
            | (0 if row.not_migratable or row.moving else FREE)
            | (ELSEWHERE if row.relayed_from else 0),
        )
        for key, row in rows.items()
    ]
    return np.array(values, np.int64).T


def _joined(columns: Iterable[Column]) -> Columns:
    parts = [np.frombuffer(column.data, _WIDTHS[column.width]) for column in columns]
    lowest = np.repeat([column.lowest for column in columns], list(map(len, parts)))
    joined: Columns = np.concatenate(parts, dtype=np.int64, casting="unsafe") + lowest
    return joined
