# SPDX-License-Identifier: Apache-2.0
"""Chooses the store of agent records and imports it then: client libraries are slow to import."""

from __future__ import annotations

from components.errors import ConfigError
from components.transfer.config import AgentConfig, StoreKind
from components.transfer.control.store import MemoryStore, RecordStore


def store_of(config: AgentConfig) -> RecordStore:
    """The configured store. Raises ``ConfigError``."""
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
