# SPDX-License-Identifier: Apache-2.0
"""A worker's settings for migration.

They come from ``DYN_MIGRATE_*`` variables, which ``dynamo serve`` sets from the YAML file. Each has a default:
a stock worker's command needs only the other module name.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from components import env
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
            },
            components=env.COMPONENTS.read(),
            repeats=env.REPEATS.read(),
            lease_s=env.LEASE_S.read(),
            drain_s=env.DRAIN_S.read(),
            integrity=env.INTEGRITY.read(),
            lora_modules=env.LORA_MODULES.read(),
        )
