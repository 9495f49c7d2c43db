# SPDX-License-Identifier: Apache-2.0
"""Agent records over NATS: as the store (JetStream KV with a time to live), or as notices beside etcd.

``NatsStore`` puts the record again every third of the lease time; NATS drops it when that stops. NATS reports
puts and deletes to watchers, but not expiry: every agent drops records that it has not seen for a lease time
while the server was reachable. ``Notices`` publishes a record to all agents and answers none.
"""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
from typing import Any

import nats
import nats.errors
from nats.aio.msg import Msg
from nats.js.api import KeyValueConfig
from nats.js.errors import BucketNotFoundError

from components.address import in_url
from components.errors import ConfigError, MigrateError, TransferUnavailable
from components.transfer.config import AgentConfig
from components.transfer.control.directory import Directory
from components.transfer.control.endpoint import without_secrets
from components.transfer.control.publication import Publication
from components.transfer.control.record import AgentRecord, decode, encode, published
from components.transfer.control.retry import first_of, forever, quietly

logger = logging.getLogger(__name__)
_CALL_S = 5.0
_REFUSED = re.compile(r"authoriz|authentic|permission|credential|nkey", re.IGNORECASE)


def _where(config: AgentConfig) -> str:
    return f"NATS at {without_secrets(config.nats_url)}"


async def _connect(config: AgentConfig) -> Any:
    options: dict[str, Any] = {"allow_reconnect": False, "connect_timeout": 5, "max_reconnect_attempts": 1}
    if config.nats_credentials:
        options["user_credentials"] = config.nats_credentials
    if config.nats_user:
        options |= {"user": config.nats_user, "password": config.nats_password}
    if config.nats_token:
        options["token"] = config.nats_token
    if config.nats_ca or config.nats_cert:
        options["tls"] = _context(config)

    async def log(error: Exception) -> None:
        logger.debug("NATS: %s", error)

    where = _where(config)
    servers = [in_url(each.strip()) for each in config.nats_url.split(",")]
    try:
        return await asyncio.wait_for(nats.connect(servers, error_cb=log, **options), _CALL_S)
    except ssl.SSLError as error:
        reason = getattr(error, "verify_message", "") or error.reason or "no TLS connection"
        raise TransferUnavailable(f"{where}: {reason}; check nats_ca, nats_cert and the certificate's names") from None
    except nats.errors.SecureConnRequiredError:
        raise TransferUnavailable(f"{where} wants TLS: give nats_ca") from None
    except nats.errors.Error as error:
        if _REFUSED.search(str(error)) is None:
            raise
        fix = "check nats_user and nats_password, nats_token, or nats_credentials"
        raise TransferUnavailable(f"{where} refuses this agent: {error}; {fix}") from None
    except OSError as error:
        raise MigrateError(f"no connection: {error.strerror or type(error).__name__}") from None


def _context(config: AgentConfig) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=config.nats_ca or None)
        if config.nats_cert:
            context.load_cert_chain(config.nats_cert, config.nats_key or None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"TLS files for NATS ({config.nats_ca}, {config.nats_cert}): {error}") from error
    return context


def _learn(directory: Directory, value: bytes, name: str | None = None) -> AgentRecord | None:
    try:
        record = decode(value) if name is None else published(value, name)
    except MigrateError as error:
        logger.warning("ignoring a record from NATS: %s", error)
        return None
    directory.put(record, from_notice=name is None)
    return record


class NatsStore:
    """Records in a JetStream KV bucket, one for each namespace."""

    def __init__(self, config: AgentConfig) -> None:
        self._config = config
        self._bucket = "dynamo-migrate-" + "".join(c if c.isalnum() or c in "-_" else "_" for c in config.namespace)
        self._ttl_s = config.lease_ttl_s

    async def run(self, record: AgentRecord, directory: Directory, publication: Publication) -> None:
        """See ``RecordStore``."""
        await forever(_where(self._config), lambda: self._session(record, directory, publication), publication.failed)

    async def _session(self, record: AgentRecord, directory: Directory, publication: Publication) -> None:
        client = await _connect(self._config)
        key = record.name.encode().hex()
        bucket = None
        try:
            bucket = await self._open(client.jetstream(timeout=_CALL_S))
            await bucket.put(key, encode(record))
            publication.succeeded()
            seen: dict[str, float] = {}
            await first_of(
                self._keep(bucket, key, record), self._watch(bucket, directory, seen), self._expire(directory, seen)
            )
        finally:
            if bucket is not None:
                await quietly(asyncio.wait_for(bucket.delete(key), 2.0))
            await quietly(client.close())

    async def _open(self, stream: Any) -> Any:
        try:
            return await stream.key_value(self._bucket)
        except BucketNotFoundError:
            return await stream.create_key_value(KeyValueConfig(self._bucket, ttl=float(self._ttl_s), history=1))

    async def _keep(self, bucket: Any, key: str, record: AgentRecord) -> None:
        while True:
            await asyncio.sleep(self._ttl_s / 3)
            await bucket.put(key, encode(record))

    async def _watch(self, bucket: Any, directory: Directory, seen: dict[str, float]) -> None:
        watcher = await bucket.watchall()
        async for entry in watcher:
            if entry is None:
                continue
            try:
                name = bytes.fromhex(entry.key).decode()
            except ValueError:
                logger.warning("ignoring key %r in NATS: it is not that of an agent", entry.key)
                continue
            if entry.operation in ("DEL", "PURGE"):
                seen.pop(name, None)
                directory.remove(name)
            elif _learn(directory, entry.value or b"", name) is not None:
                seen[name] = asyncio.get_running_loop().time()
        raise MigrateError("the watch ended")

    async def _expire(self, directory: Directory, seen: dict[str, float]) -> None:
        while True:
            await asyncio.sleep(self._ttl_s / 2)
            now = asyncio.get_running_loop().time()
            for name in [n for n, at in seen.items() if now - at > 1.5 * self._ttl_s]:
                del seen[name]
                directory.remove(name)


class Notices:
    """Sends the record to other agents as soon as etcd has it. A lost notice does no harm."""

    def __init__(self, config: AgentConfig) -> None:
        self._config = config
        self._subject = f"dynamo-migrate.{config.namespace}.agents".replace(" ", "_")
        self._again = asyncio.Event()

    def announce(self) -> None:
        """Publish the record."""
        self._again.set()

    async def run(self, record: AgentRecord, directory: Directory) -> None:
        """Publish what is announced, and listen, until cancelled."""
        await forever(_where(self._config), lambda: self._session(record, directory))

    async def _session(self, record: AgentRecord, directory: Directory) -> None:
        client = await _connect(self._config)

        async def heard(message: Msg) -> None:
            _learn(directory, message.data)

        try:
            await client.subscribe(self._subject, cb=heard)
            while client.is_connected:
                # Not at intervals: each notice goes to all agents.
                if self._again.is_set():
                    self._again.clear()
                    await client.publish(self._subject, encode(record))
                await quietly(asyncio.wait_for(self._again.wait(), self._config.lease_ttl_s))
            raise MigrateError("the connection was closed")
        finally:
            await quietly(client.close())
