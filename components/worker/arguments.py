# SPDX-License-Identifier: Apache-2.0
"""Engine arguments that migration adds to a ``dynamo.vllm`` worker, and the worker's settings for migration.

Settings come from ``DYN_MIGRATE_*`` variables, which ``dynamo serve`` sets from the YAML file. Each has a default:
a stock worker's command needs only the other module name.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from components import env
from components.engine.vllm.arguments import configure
from components.models import adapters
from components.transfer.config import AgentConfig


@dataclass(frozen=True)
class WorkerSettings:
    """See the module docstring."""

    agent: dict[str, Any]
    """Fields of ``components.transfer.AgentConfig`` except those of the layout."""
    components: tuple[str, ...] = ("backend", "prefill")
    """Dynamo components with workers that move requests or hand them off."""
    repeats: bool = True
    lease_s: float = 60.0
    drain_s: float = 25.0
    integrity: str = "tail"
    wait_bytes: int = 16 << 20
    copy_deadline_s: float = 30.0
    lora_modules: Mapping[str, str] = field(default_factory=dict)
    """LoRA adapters to load before the worker is ready: name and PEFT folder."""

    @classmethod
    def from_environment(cls) -> WorkerSettings:
        """Read the variables. Raises ``ConfigError`` naming an unusable one."""
        # A successor of this process keeps the name.
        component = env.COMPONENT.read()
        place = f"{component}-{env.REPLICA.read()}" if component else str(os.getpid())
        return cls(
            env.stores()
            | AgentConfig.tuned(env.TRANSFER.read())
            | {
                "name": env.AGENT.read() or f"{socket.gethostname()}-{place}",
                "advertise_host": env.HOST.read(),
                "calibration": env.CALIBRATION.read(),
            },
            components=env.COMPONENTS.read(),
            repeats=env.REPEATS.read(),
            lease_s=env.LEASE_S.read(),
            drain_s=env.DRAIN_S.read(),
            integrity=env.INTEGRITY.read(),
            lora_modules=env.LORA_MODULES.read(),
        )


def prepare(config: Any, settings: WorkerSettings) -> None:
    """Set scheduler, connector and worker extension in Dynamo's ``Config``. Raises ``ConfigError`` on a conflict."""
    from dynamo.vllm.kv_connector_protocols import KV_CONNECTOR_PROTOCOLS, NixlConnectorProtocol

    # Dynamo's registry of prefill protocols; this connector's is NixlConnector's.
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
