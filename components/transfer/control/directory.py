# SPDX-License-Identifier: Apache-2.0
"""The local copy of all agent records, which stays usable while the store is unreachable.

Thread-safe. ``on_new`` is called for every new life (epoch) of an agent, on the thread that adds it.
A store reports the lives of an agent in order. Notices may be late: an older life in a notice never replaces a newer
one, by their start times. A clock that is set back therefore only delays notices.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection

from components.transfer.control.record import AgentRecord


class Directory:
    """Records by agent name."""

    def __init__(self, on_new: Callable[[AgentRecord], None] = lambda _: None) -> None:
        self._records: dict[str, AgentRecord] = {}
        self._lock = threading.Lock()
        self._on_new = on_new

    def put(self, record: AgentRecord, from_notice: bool = False) -> None:
        """Add or replace a record. ``from_notice``: not from the store, which knows the order of lives."""
        with self._lock:
            known = self._records.get(record.name)
            if from_notice and known is not None and known.epoch != record.epoch and known.started > record.started:
                return
            self._records[record.name] = record
        if known is None or known.epoch != record.epoch:
            self._on_new(record)

    def remove(self, name: str) -> None:
        """Drop an agent."""
        with self._lock:
            self._records.pop(name, None)

    def keep_only(self, names: Collection[str]) -> None:
        """Drop all other agents."""
        with self._lock:
            for name in set(self._records) - set(names):
                del self._records[name]

    def get(self, name: str) -> AgentRecord | None:
        """The newest known record of an agent."""
        with self._lock:
            return self._records.get(name)

    def names(self) -> list[str]:
        """All known agents."""
        with self._lock:
            return sorted(self._records)
