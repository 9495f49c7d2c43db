# SPDX-License-Identifier: Apache-2.0
"""Stores of agent records: the interface, and the store of one process.

Life cycle: ``run`` publishes the record, watches all others and keeps doing both until it is cancelled; then
it withdraws the record. During an outage the directory keeps its records; the record is published again when
the store is back, also an emptied one. Everything runs on one asyncio loop.
"""

from __future__ import annotations

import asyncio
import threading
from typing import ClassVar, Protocol

from components.transfer.control.directory import Directory
from components.transfer.control.publication import Publication
from components.transfer.control.record import AgentRecord


class RecordStore(Protocol):
    """Publishes one record and watches the others."""

    async def run(self, record: AgentRecord, directory: Directory, publication: Publication) -> None:
        """Publish and watch until cancelled; withdraw the record then."""
        ...


class MemoryStore:
    """Records of agents in one process, for tests and simulations."""

    _shared: ClassVar[dict[str, list[Directory]]] = {}
    _records: ClassVar[dict[str, dict[str, AgentRecord]]] = {}
    _lock = threading.Lock()

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace

    async def run(self, record: AgentRecord, directory: Directory, publication: Publication) -> None:
        """See ``RecordStore``."""
        with self._lock:
            everyone = self._shared.setdefault(self._namespace, [])
            records = self._records.setdefault(self._namespace, {})
            everyone.append(directory)
            records[record.name] = record
            for other in records.values():
                directory.put(other)
            for member in everyone:
                member.put(record)
        publication.succeeded()
        try:
            await asyncio.Event().wait()
        finally:
            with self._lock:
                everyone.remove(directory)
                if records.get(record.name) is record:
                    del records[record.name]
                    for member in everyone:
                        member.remove(record.name)
