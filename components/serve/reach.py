# SPDX-License-Identifier: Apache-2.0
"""Listening addresses of a graph's processes: loopback, while the whole graph is on this machine.

Dynamo's default is every interface. A graph is on this machine alone when ``dynamo serve`` starts its etcd, or its
etcd is on loopback, and no worker advertises another address. The user's variables win. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping

from components import env
from components.address import Address, is_loopback

_LOOPBACK = {
    "DYN_TCP_RPC_HOST": "127.0.0.1",
    # Dynamo expects the name of an interface.
    "DYN_TCP_RESPONSE_STREAM_HOST": "lo",
    "DYN_SYSTEM_HOST": "127.0.0.1",
}


def stays_here(environment: Mapping[str, str], advertised: str = "127.0.0.1") -> bool:
    """True when all its peers run on this machine."""
    hosts = [Address.of(url).host for url in env.ETCD_ENDPOINTS.read(environment)]
    return all(is_loopback(host) for host in (*hosts, advertised)) and not env.METRICS_HOST.read(environment)


def variables(environment: Mapping[str, str], advertised: str = "127.0.0.1") -> dict[str, str]:
    """Variables with the listening address for Dynamo's runtime."""
    if not stays_here(environment, advertised):
        return {}
    return {name: value for name, value in _LOOPBACK.items() if name not in environment}
