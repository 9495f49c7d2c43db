# SPDX-License-Identifier: Apache-2.0
"""Records under ``/dynamo-migrate/<namespace>/agents/`` in etcd, each under its agent's lease.

See ``RecordStore``. A session is: lease, put, then keep-alive and watch until one of them fails; the next
session starts over, so a lost lease, a restart of etcd and an etcd that comes back empty are one case.
Peers that a new session does not find stay known for two lease times: they may be publishing again, too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from components.errors import ConfigError, MigrateError
from components.transfer.config import AgentConfig
from components.transfer.control.directory import Directory
from components.transfer.control.nats import Notices
from components.transfer.control.record import AgentRecord, decode, encode
from components.transfer.control.store import first_of, forever, quietly

logger = logging.getLogger(__name__)

_DELETE = 1
"""``mvccpb.Event.EventType.DELETE``."""
_CALL_S = 5.0


class EtcdStore:
    """See the module docstring."""

    def __init__(self, config: AgentConfig) -> None:
        self._endpoints = [endpoint.split("://", 1)[-1] for endpoint in config.etcd_endpoints]
        self._prefix = f"/dynamo-migrate/{config.namespace}/agents/"
        self._range_end = self._prefix[:-1] + chr(ord(self._prefix[-1]) + 1)
        self._ttl_s = config.lease_ttl_s
        self._user, self._password = config.etcd_user, config.etcd_password
        self._tls = {
            "ca_cert": _pem(config.etcd_ca),
            "cert_chain": _pem(config.etcd_cert),
            "cert_key": _pem(config.etcd_key),
        }
        self._notices = Notices(config) if config.nats_url else None

    async def run(self, record: AgentRecord, directory: Directory, published: Callable[[], None]) -> None:
        """See ``RecordStore``."""
        jobs = [forever(f"etcd at {self._endpoints}", lambda: self._session(record, directory, published))]
        if self._notices is not None:
            jobs.append(self._notices.run(record, directory))
        await first_of(*jobs)

    async def _session(self, record: AgentRecord, directory: Directory, published: Callable[[], None]) -> None:
        from etcd3aio.client import Etcd3Client

        tls: dict[str, Any] = {name: value for name, value in self._tls.items() if value is not None}
        opened: Any = Etcd3Client(self._endpoints, **tls)
        async with opened as client:
            if self._user:
                reply = await client.auth.authenticate(self._user, self._password)
                client.set_token(reply.token)
            lease = (await client.lease.grant(self._ttl_s, timeout=_CALL_S)).ID
            try:
                await client.kv.put(self._prefix + record.name, encode(record), lease=lease, timeout=_CALL_S)
                published()
                if self._notices is not None:
                    self._notices.announce()
                await first_of(self._keep_alive(client, lease), self._watch(client, directory))
            finally:
                await quietly(client.lease.revoke(lease, timeout=2.0, max_attempts=1))

    async def _keep_alive(self, client: Any, lease: int) -> None:
        async with client.lease.keep_alive_context(lease, self._ttl_s) as keeper:
            while keeper.alive:
                await asyncio.sleep(self._ttl_s / 5)
        raise MigrateError("the lease was lost")

    async def _watch(self, client: Any, directory: Directory) -> None:
        known = await client.kv.get(self._prefix, self._range_end, timeout=_CALL_S)
        for pair in known.kvs:
            self._learn(directory, pair.value)
        await first_of(
            self._follow(client, directory, known.header.revision + 1), self._forget_missing(client, directory)
        )

    async def _follow(self, client: Any, directory: Directory, revision: int) -> None:
        async for response in client.watch.watch(self._prefix, self._range_end, revision):
            for event in response.events:
                if event.type == _DELETE:
                    directory.remove(event.kv.key.decode()[len(self._prefix) :])
                else:
                    self._learn(directory, event.kv.value)
        raise MigrateError("the watch ended")

    async def _forget_missing(self, client: Any, directory: Directory) -> None:
        await asyncio.sleep(2 * self._ttl_s)
        known = await client.kv.get(self._prefix, self._range_end, timeout=_CALL_S)
        directory.keep_only({pair.key.decode()[len(self._prefix) :] for pair in known.kvs})
        await asyncio.Event().wait()

    def _learn(self, directory: Directory, value: bytes) -> None:
        try:
            directory.put(decode(value))
        except MigrateError as error:
            logger.warning("ignoring a record under %s: %s", self._prefix, error)


def _pem(path: str) -> bytes | None:
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"TLS file for etcd: {error}") from error
