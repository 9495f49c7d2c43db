# SPDX-License-Identifier: Apache-2.0
"""Where agent records live: the interface, and the store of one process.

Life cycle: ``run`` publishes the record, watches all others and keeps doing both until it is cancelled; then
it withdraws the record. Outages are survived: the directory keeps what it knew, publication is repeated when
the store is back, also when it comes back empty. Everything runs on one asyncio loop.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import ClassVar, Protocol

from components.errors import ConfigError
from components.transfer.config import AgentConfig, StoreKind
from components.transfer.control.directory import Directory
from components.transfer.control.publication import Publication
from components.transfer.control.record import AgentRecord

logger = logging.getLogger(__name__)

_FIRST_DELAY_S = 0.2
_LAST_DELAY_S = 5.0


class RecordStore(Protocol):
    """A place to publish one record and watch the others."""

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


def store_of(config: AgentConfig) -> RecordStore:
    """The store that the configuration names. Raises ``ConfigError``."""
    kind = config.store
    if kind is StoreKind.AUTO:
        kind = StoreKind.ETCD if config.etcd_endpoints else StoreKind.NATS if config.nats_url else StoreKind.MEMORY
    if kind is StoreKind.MEMORY:
        return MemoryStore(config.namespace)
    if kind is StoreKind.ETCD:
        from components.transfer.control.etcd import EtcdStore

        if not config.etcd_endpoints:
            raise ConfigError("store etcd needs etcd_endpoints")
        return EtcdStore(config)
    from components.transfer.control.nats import NatsStore

    if not config.nats_url:
        raise ConfigError("store nats needs nats_url")
    return NatsStore(config)


def _ignore(_: Exception) -> None:
    """Nobody waits for this one."""


async def forever(
    where: str, session: Callable[[], Awaitable[None]], failed: Callable[[Exception], None] = _ignore
) -> None:
    """Run a session again whenever it ends; only cancelling ends this. ``failed`` is told why it ended."""
    delay = _FIRST_DELAY_S
    while True:
        began = asyncio.get_running_loop().time()
        try:
            await session()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            # Whatever the client library raises, known peers must go on working: keep trying.
            logger.warning("%s: %s; trying again", where, str(error) or type(error).__name__)
            failed(error)
        if asyncio.get_running_loop().time() - began > _LAST_DELAY_S:
            delay = _FIRST_DELAY_S
        await asyncio.sleep(delay)
        delay = min(delay * 2, _LAST_DELAY_S)


async def first_of(*jobs: Awaitable[None]) -> None:
    """Run jobs until one ends, then end the others. Raises what the first one raised."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def quietly(work: Awaitable[object]) -> None:
    """Await something whose failure does not matter any more."""
    try:
        await work
    except Exception as error:
        logger.debug("while leaving a store: %s", error)
