# SPDX-License-Identifier: Apache-2.0
"""Where agent records live: one interface, an in-memory store, and etcd under a lease.

Life cycle: ``run`` publishes the record, watches all others and keeps doing both until it is cancelled.
Outages are survived: the directory keeps what it knew, publication is repeated when the store is back,
also when it comes back empty. Threading: everything on one asyncio loop; ``Directory`` may be read anywhere.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import Protocol

from components.errors import MigrateError
from components.transfer.control.record import AgentRecord, decode, encode

logger = logging.getLogger(__name__)

_DELETE = 1
"""``mvccpb.Event.EventType.DELETE``."""


class Directory:
    """Local copy of all records, by agent name. Thread-safe; ``wait`` blocks."""

    def __init__(self) -> None:
        self._records: dict[str, AgentRecord] = {}
        self._changed = threading.Condition()

    def put(self, record: AgentRecord) -> None:
        """A record appeared or changed."""
        with self._changed:
            self._records[record.name] = record
            self._changed.notify_all()

    def remove(self, name: str) -> None:
        """An agent is gone."""
        with self._changed:
            self._records.pop(name, None)
            self._changed.notify_all()

    def get(self, name: str) -> AgentRecord | None:
        """The newest known record of an agent."""
        with self._changed:
            return self._records.get(name)

    def names(self) -> list[str]:
        """All known agents."""
        with self._changed:
            return sorted(self._records)

    def wait(self, name: str, timeout_s: float) -> AgentRecord | None:
        """The record of an agent, waiting for it to appear."""
        with self._changed:
            self._changed.wait_for(lambda: name in self._records, timeout_s)
            return self._records.get(name)


class RecordStore(Protocol):
    """A place to publish one record and watch the others."""

    async def run(self, record: AgentRecord, directory: Directory, published: Callable[[], None]) -> None:
        """Publish and watch until cancelled; withdraw the record then."""
        ...


class MemoryStore:
    """Records of agents in one process, for tests and simulations."""

    _shared: dict[str, list[Directory]] = {}
    _records: dict[str, dict[str, AgentRecord]] = {}
    _lock = threading.Lock()

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace

    async def run(self, record: AgentRecord, directory: Directory, published: Callable[[], None]) -> None:
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
        published()
        try:
            await asyncio.Event().wait()
        finally:
            with self._lock:
                everyone.remove(directory)
                if records.get(record.name) is record:
                    del records[record.name]
                    for member in everyone:
                        member.remove(record.name)


class EtcdStore:
    """Records under ``/dynamo-migrate/<namespace>/agents/`` in etcd, each under its agent's lease."""

    def __init__(self, endpoints: tuple[str, ...], namespace: str, ttl_s: int, user: str, password: str) -> None:
        self._endpoints = [endpoint.split("://", 1)[-1] for endpoint in endpoints]
        self._prefix = f"/dynamo-migrate/{namespace}/agents/"
        self._ttl_s = ttl_s
        self._user, self._password = user, password

    async def run(self, record: AgentRecord, directory: Directory, published: Callable[[], None]) -> None:
        """See ``RecordStore``. Never ends by itself: every failure is logged and tried again."""
        delay = 0.2
        while True:
            try:
                await self._session(record, directory, published)
                delay = 0.2
            except asyncio.CancelledError:
                raise
            except Exception as error:
                # Whatever the client library raises, known peers must go on working: keep trying.
                logger.warning("etcd at %s: %s; trying again", self._endpoints, error or type(error).__name__)
            await asyncio.sleep(delay)
            delay = min(delay * 2, 5.0)

    async def _session(self, record: AgentRecord, directory: Directory, published: Callable[[], None]) -> None:
        from etcd3aio.client import Etcd3Client

        async with Etcd3Client(self._endpoints) as client:
            if self._user:
                reply = await client.auth.authenticate(self._user, self._password)
                client.set_token(reply.token)
            lease = (await client.lease.grant(self._ttl_s)).ID
            key = self._prefix + record.name
            await client.kv.put(key, encode(record), lease=lease)
            published()
            try:
                await self._until_one_ends(
                    self._keep_alive(client, lease),
                    self._watch(client, directory),
                )
            finally:
                await _quietly(client.lease.revoke(lease, timeout=2.0))

    async def _until_one_ends(self, *jobs: Awaitable[None]) -> None:
        tasks = [asyncio.ensure_future(job) for job in jobs]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep_alive(self, client: object, lease: int) -> None:
        keeper = client.lease.keep_alive_context(lease, self._ttl_s)  # type: ignore[attr-defined]
        async with keeper:
            while keeper.alive:
                await asyncio.sleep(self._ttl_s / 5)
        raise MigrateError("the lease was lost")

    async def _watch(self, client: object, directory: Directory) -> None:
        end = self._prefix[:-1] + chr(ord(self._prefix[-1]) + 1)
        known = await client.kv.get(self._prefix, end, timeout=5.0)  # type: ignore[attr-defined]
        for pair in known.kvs:
            self._learn(directory, pair.value)
        revision = known.header.revision + 1
        async for response in client.watch.watch(self._prefix, end, revision):  # type: ignore[attr-defined]
            for event in response.events:
                if event.type == _DELETE:
                    directory.remove(event.kv.key.decode()[len(self._prefix) :])
                else:
                    self._learn(directory, event.kv.value)
        raise MigrateError("the watch ended")

    def _learn(self, directory: Directory, value: bytes) -> None:
        try:
            directory.put(decode(value))
        except MigrateError as error:
            logger.warning("ignoring a record under %s: %s", self._prefix, error)


async def _quietly(work: Awaitable[object]) -> None:
    try:
        await work
    except Exception as error:
        logger.debug("while leaving etcd: %s", error)
