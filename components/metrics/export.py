# SPDX-License-Identifier: Apache-2.0
"""Makes metrics in a component's registry and adds the registry to its ``/metrics``.

Dynamo calls collectors from its own thread at a scrape; they must only read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.core import Metric as Exported

from components import env
from components.address import Address, dialled, is_any
from components.metrics.names import PREFIX, Kind, Metric

Family = CounterMetricFamily | GaugeMetricFamily


class Registry(CollectorRegistry):
    """A registry without gauges of creation times, which are unused. Other registries keep theirs."""

    def collect(self) -> Iterator[Exported]:
        """All families."""
        for found in super().collect():
            found.samples = [sample for sample in found.samples if not sample.name.endswith("_created")]
            yield found


def counter(metric: Metric, registry: CollectorRegistry) -> Counter:
    """A counter; without labels it shows 0 at once."""
    return Counter(f"{PREFIX}_{metric.name}", metric.help, metric.labels, registry=registry)


def histogram(metric: Metric, registry: CollectorRegistry) -> Histogram:
    """A histogram with the metric's buckets."""
    name = f"{PREFIX}_{metric.name}"
    return Histogram(name, metric.help, metric.labels, registry=registry, buckets=metric.buckets)


def family(metric: Metric, values: dict[tuple[str, ...], float]) -> Family:
    """A collector's family of a metric that is read at the scrape."""
    kind = CounterMetricFamily if metric.kind is Kind.COUNTER else GaugeMetricFamily
    found: Family = kind(f"{PREFIX}_{metric.name}", metric.help, labels=metric.labels)
    for labels, value in values.items():
        found.add_metric(labels, value)
    return found


def reachable(host: str) -> str:
    """Host at which Prometheus reaches a process that listens on ``host``; ``DYN_MIGRATE_METRICS_HOST`` wins."""
    return env.METRICS_HOST.read() or dialled(host)


def address(host: str = "127.0.0.1") -> str:
    """host:port of this process's ``/metrics``; empty: none."""
    port, listens = env.SYSTEM_PORT.read(), env.SYSTEM_HOST.read()
    where = listens if listens and not is_any(listens) else host
    return str(Address(reachable(where), port)) if port > 0 else ""


def expose(registry: CollectorRegistry, endpoint: Any, namespace: str, component: str, name: str = "generate") -> None:
    """Add the registry to the process's ``/metrics``, with Dynamo's labels."""
    from dynamo.common.utils.prometheus import register_engine_metrics_callback

    register_engine_metrics_callback(
        endpoint=endpoint,
        registry=registry,
        namespace_name=namespace,
        component_name=component,
        endpoint_name=name,
    )
