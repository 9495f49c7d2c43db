# SPDX-License-Identifier: Apache-2.0
"""Declaration of a graph: one ``Service`` for each component, joined by ``link``.

    Frontend = Service("Frontend", "dynamo.frontend", FrontendConfig)
    Worker = Service("Worker", "components.worker", WorkerConfig, mode="agg")
    Frontend.link(Worker)

Everything reachable from the entry is started, dependencies first. ``load`` raises ``ConfigError``.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field

from components.config import ComponentConfig, nearest
from components.errors import ConfigError


@dataclass
class Service:
    """One component: ``module`` is run as ``python -m``, once for each replica."""

    name: str
    module: str
    config: type[ComponentConfig]
    mode: str = ""
    """Mode of a worker: ``agg``, ``prefill`` or ``decode``."""
    links: list[Service] = field(default_factory=list)

    @property
    def role(self) -> str:
        """``prefill``, ``decode`` (also for ``agg``), or empty."""
        return "decode" if self.mode == "agg" else self.mode

    def link(self, *others: Service) -> Service:
        """Depend on other components. Returns the last one, for chains."""
        self.links += others
        return others[-1]

    def start_order(self) -> list[Service]:
        """All reachable components, dependencies first."""
        order: list[Service] = []

        def visit(service: Service) -> None:
            for other in service.links:
                visit(other)
            if service not in order:
                order.append(service)

        visit(self)
        return order


def load(target: str) -> Service:
    """The entry that ``module:Name`` names."""
    module_name, _, entry = target.partition(":")
    if not entry:
        raise ConfigError(f"{target!r} names no entry: write graphs.disagg:Frontend")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and module_name.startswith(error.name):
            raise ConfigError(f"there is no graph module {module_name!r}: see the folder graphs/") from error
        raise
    services = {name: value for name, value in vars(module).items() if isinstance(value, Service)}
    if entry not in services:
        raise ConfigError(f"graph {module_name} has no entry {entry!r}{nearest(entry, list(services))}")
    return services[entry]
