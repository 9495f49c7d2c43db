# SPDX-License-Identifier: Apache-2.0
"""What migration adds to the engine arguments of a ``dynamo.vllm`` worker, and the settings that it has itself.

Settings come from ``DYN_MIGRATE_*`` variables, which ``dynamo serve`` sets from the YAML file; each has a default, so
that a stock worker command needs no more than another module name.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from components.engine.vllm.arguments import configure
from components.errors import ConfigError
from components.models import adapters


@dataclass(frozen=True)
class WorkerSettings:
    """See the module docstring."""

    agent: dict[str, Any]
    """Fields of ``components.transfer.AgentConfig`` but those of the layout."""
    components: tuple[str, ...] = ("backend", "prefill")
    """Dynamo components whose workers move requests or hand them over."""
    repeats: bool = True
    lease_s: float = 60.0
    drain_s: float = 25.0
    integrity: str = "tail"
    wait_bytes: int = 16 << 20
    copy_deadline_s: float = 30.0
    lora_modules: Mapping[str, str] = field(default_factory=dict)
    """LoRA adapters that are loaded before the worker counts as ready: name and PEFT folder."""

    @classmethod
    def from_environment(cls) -> WorkerSettings:
        """Raises ``ConfigError`` naming the variable that cannot be used."""
        env = os.environ
        # A successor of this process takes the same place in the graph.
        component = env.get("DYN_MIGRATE_COMPONENT", "")
        place = f"{component}-{env.get('DYN_MIGRATE_REPLICA', '0')}" if component else str(os.getpid())
        name = f"{socket.gethostname()}-{place}"
        agent: dict[str, Any] = {
            "name": env.get("DYN_MIGRATE_AGENT", name),
            "etcd_endpoints": env.get("ETCD_ENDPOINTS", "http://127.0.0.1:2379").split(","),
            "etcd_user": env.get("ETCD_AUTH_USERNAME", ""),
            "etcd_password": env.get("ETCD_AUTH_PASSWORD", ""),
            "etcd_ca": env.get("ETCD_AUTH_CA", ""),
            "etcd_cert": env.get("ETCD_AUTH_CLIENT_CERT", ""),
            "etcd_key": env.get("ETCD_AUTH_CLIENT_KEY", ""),
            "nats_url": env.get("NATS_SERVER", ""),
            "nats_user": env.get("NATS_AUTH_USERNAME", ""),
            "nats_password": env.get("NATS_AUTH_PASSWORD", ""),
            "nats_token": env.get("NATS_AUTH_TOKEN", ""),
            "nats_credentials": env.get("NATS_AUTH_CREDENTIALS_FILE", ""),
            "nats_ca": env.get("DYN_MIGRATE_NATS_CA", ""),
            "namespace": env.get("DYN_NAMESPACE", "dynamo"),
            "transport": env.get("DYN_MIGRATE_TRANSPORT", "auto"),
            "advertise_host": env.get("DYN_MIGRATE_HOST", "127.0.0.1"),
            "calibration": env.get("DYN_MIGRATE_CALIBRATION", ""),
        }
        return cls(
            agent,
            repeats=env.get("DYN_MIGRATE_REPEATS", "1") not in ("0", "false"),
            lease_s=_seconds("DYN_MIGRATE_LEASE_S", 60.0),
            drain_s=_seconds("DYN_MIGRATE_DRAIN_S", 25.0),
            integrity=env.get("DYN_MIGRATE_INTEGRITY", "tail"),
            lora_modules=_adapters("DYN_MIGRATE_LORA_MODULES"),
        )


def _seconds(name: str, default: float) -> float:
    text = os.environ.get(name, "")
    try:
        value = float(text) if text else default
    except ValueError as error:
        raise ConfigError(f"{name}={text!r}: write seconds as a number") from error
    if not 0 <= value < 86400:
        raise ConfigError(f"{name}={text!r}: write a number of at least 0 and below 86400")
    return value


def _adapters(name: str) -> dict[str, str]:
    text = os.environ.get(name, "")
    try:
        return msgspec.json.decode(text, type=dict[str, str]) if text else {}
    except msgspec.DecodeError as error:
        raise ConfigError(f'{name}={text!r}: write a JSON object, {{"name": "folder"}}') from error


def prepare(config: Any, settings: WorkerSettings) -> None:
    """Give Dynamo's ``Config`` our scheduler, connector and worker extension. Raises ``ConfigError`` on a clash."""
    from dynamo.vllm.kv_connector_protocols import KV_CONNECTOR_PROTOCOLS, NixlConnectorProtocol

    # Dynamo's registry of prefill protocols; ours is that of NixlConnector.
    KV_CONNECTOR_PROTOCOLS.setdefault("MigrationConnector", NixlConnectorProtocol)
    configure(
        config.engine_args,
        settings.agent,
        {
            "integrity": settings.integrity,
            "wait_bytes": settings.wait_bytes,
            "copy_deadline_s": settings.copy_deadline_s,
            "adapters": adapters.digest(settings.lora_modules),
        },
    )
