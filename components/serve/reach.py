# SPDX-License-Identifier: Apache-2.0
"""From where the processes of a graph can be reached: from this machine only, as long as the graph is only on it.

Dynamo's own default is every interface. A graph counts as being on this machine alone while its etcd is our own or on
loopback and no worker advertises another address. A variable that the user set wins. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping

from components import env
from components.address import Address, is_loopback

_LOOPBACK = {
    "DYN_TCP_RPC_HOST": "127.0.0.1",
    # Dynamo takes the name of an interface here.
    "DYN_TCP_RESPONSE_STREAM_HOST": "lo",
    "DYN_SYSTEM_HOST": "127.0.0.1",
}


def stays_here(environment: Mapping[str, str], advertised: str = "127.0.0.1") -> bool:
    """Does everything that must reach this process run on this machine?"""
    hosts = [Address.of(url).host for url in env.ETCD_ENDPOINTS.read(environment)]
    return all(is_loopback(host) for host in (*hosts, advertised)) and not env.METRICS_HOST.read(environment)


def variables(environment: Mapping[str, str], advertised: str = "127.0.0.1") -> dict[str, str]:
    """What tells Dynamo's runtime where to listen."""
    if not stays_here(environment, advertised):
        return {}
    return {name: value for name, value in _LOOPBACK.items() if name not in environment}
