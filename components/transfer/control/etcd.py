# SPDX-License-Identifier: Apache-2.0
"""Records under ``/dynamo-migrate/<namespace>/agents/`` in etcd, each under its agent's lease.

See ``RecordStore``. A session takes a lease, puts the record, then keeps the lease alive and watches until one of
them fails; the next session starts over, so a lost lease, a restart of etcd and an emptied etcd are one case.
Peers that a new session does not find stay known for two lease times: they may have to publish again as well.
"""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.address import Address
from components.errors import ConfigError, MigrateError, TransferUnavailable
from components.transfer.config import AgentConfig
from components.transfer.control.directory import Directory
from components.transfer.control.endpoint import Endpoint, resolve
from components.transfer.control.nats import Notices
from components.transfer.control.publication import Publication
from components.transfer.control.record import AgentRecord, encode, published
from components.transfer.control.retry import first_of, forever, quietly

logger = logging.getLogger(__name__)

_DELETE = 1
"""``mvccpb.Event.EventType.DELETE``."""
_CALL_S = 5.0
_TLS_TROUBLE = re.compile(r"certificate|handshake|ssl|tls", re.IGNORECASE)


class EtcdStore:
    """See the module docstring."""

    def __init__(self, config: AgentConfig) -> None:
        self._endpoints = [Endpoint.of(url) for url in config.etcd_endpoints]
        self._where = "etcd at " + ", ".join(str(Address(each.host, each.port)) for each in self._endpoints)
        self.prefix = f"/dynamo-migrate/{config.namespace}/agents/"
        self._range_end = self.prefix[:-1] + chr(ord(self.prefix[-1]) + 1)
        self._ttl_s = config.lease_ttl_s
        self._user, self._password = config.etcd_user, config.etcd_password
        secure = any(each.secure for each in self._endpoints)
        self._tls = {
            "ca_cert": _pem(config.etcd_ca or (_system_authorities() if secure else "")),
            "cert_chain": _pem(config.etcd_cert),
            "cert_key": _pem(config.etcd_key),
        }
        if self._tls["ca_cert"] is None and (config.etcd_cert or config.etcd_key):
            raise ConfigError("etcd_cert and etcd_key need TLS: give etcd_ca, or https endpoints")
        self._notices = Notices(config) if config.nats_url else None

    async def run(self, record: AgentRecord, directory: Directory, publication: Publication) -> None:
        """See ``RecordStore``."""
        jobs = [forever(self._where, lambda: self._session(record, directory, publication), publication.failed)]
        if self._notices is not None:
            jobs.append(self._notices.run(record, directory))
        await first_of(*jobs)

    async def _session(self, record: AgentRecord, directory: Directory, publication: Publication) -> None:
        from etcd3aio.client import Etcd3Client

        options: dict[str, Any] = {name: value for name, value in self._tls.items() if value is not None}
        if options:
            options["tls_server_name"] = self._endpoints[0].host
        opened: Any = Etcd3Client(**options)
        # The client library itself would use IPv4 alone and let gRPC look for a proxy.
        opened._manager.target = await resolve(self._endpoints)
        opened._manager.grpc_options.append(("grpc.enable_http_proxy", 0))
        async with opened as client:
            with self._refusals():
                if self._user:
                    reply = await client.auth.authenticate(self._user, self._password, timeout=_CALL_S)
                    client.set_token(reply.token)
                lease = (await client.lease.grant(self._ttl_s, timeout=_CALL_S)).ID
            try:
                with self._refusals():
                    await client.kv.put(self.prefix + record.name, encode(record), lease=lease, timeout=_CALL_S)
                publication.succeeded()
                if self._notices is not None:
                    self._notices.announce()
                await first_of(self._keep_alive(client, lease), self._watch(client, directory))
            finally:
                await quietly(client.lease.revoke(lease, timeout=2.0, max_attempts=1))

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Raise a clear error for wrong credentials or certificates; ignore other errors."""
        import grpc
        from etcd3aio import errors

        try:
            yield
        except (errors.EtcdUnauthenticatedError, errors.EtcdPermissionDeniedError, grpc.aio.AioRpcError) as error:
            reason = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
            fix = f"check etcd_user ({self._user!r}) and its password and roles for keys under {self.prefix}"
            raise TransferUnavailable(f"{self._where} refuses this agent: {reason}; {fix}") from None
        except errors.EtcdConnectionError as error:
            if _TLS_TROUBLE.search(str(error)) is None:
                raise
            reason = "its certificate is not accepted" if self._tls["ca_cert"] else "it wants TLS"
            fix = "check etcd_ca, etcd_cert, etcd_key and the host name in the certificate"
            raise TransferUnavailable(f"{self._where}: {reason}; {fix} ({error})") from None

    async def _keep_alive(self, client: Any, lease: int) -> None:
        async with client.lease.keep_alive_context(lease, self._ttl_s) as keeper:
            while keeper.alive:
                await asyncio.sleep(self._ttl_s / 5)
        raise MigrateError("the lease was lost")

    async def _watch(self, client: Any, directory: Directory) -> None:
        known = await client.kv.get(self.prefix, self._range_end, timeout=_CALL_S)
        for pair in known.kvs:
            self.learn(directory, pair.key, pair.value)
        await first_of(
            self._follow(client, directory, known.header.revision + 1), self._forget_missing(client, directory)
        )

    async def _follow(self, client: Any, directory: Directory, revision: int) -> None:
        async for response in client.watch.watch(self.prefix, self._range_end, revision):
            for event in response.events:
                if event.type == _DELETE:
                    directory.remove(self._name(event.kv.key))
                else:
                    self.learn(directory, event.kv.key, event.kv.value)
        raise MigrateError("the watch ended")

    async def _forget_missing(self, client: Any, directory: Directory) -> None:
        await asyncio.sleep(2 * self._ttl_s)
        known = await client.kv.get(self.prefix, self._range_end, timeout=_CALL_S)
        directory.keep_only({self._name(pair.key) for pair in known.kvs})
        await asyncio.Event().wait()

    def _name(self, key: bytes) -> str:
        return key.decode(errors="replace")[len(self.prefix) :]

    def learn(self, directory: Directory, key: bytes, value: bytes) -> None:
        """Take a record from etcd; ignore other values."""
        try:
            directory.put(published(value, self._name(key)))
        except MigrateError as error:
            logger.warning("ignoring a record under %s: %s", self.prefix, error)


def _system_authorities() -> str:
    paths = ssl.get_default_verify_paths()
    found = paths.cafile or paths.openssl_cafile
    if not Path(found).is_file():
        raise ConfigError("https endpoints of etcd need etcd_ca: this system has no file of authorities")
    return found


def _pem(path: str) -> bytes | None:
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"TLS file for etcd: {error}") from error
