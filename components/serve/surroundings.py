# SPDX-License-Identifier: Apache-2.0
"""The environment of a graph's processes, before what the plan says of each. Pure.

What the user has set wins, but for the way to this machine itself: that never leads over a proxy, and output is UTF-8,
as the launcher reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

_DEFAULTS = {
    # A worker's drain begins with what Dynamo waits for here: that frontends have noticed.
    "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": "1",
    "DYN_EVENT_PLANE": "zmq",
    # The second part: a text model "is not supported" by the routing of images.
    "DYN_LOG": "warn,mm_routing=off",
    "NIXL_LOG_LEVEL": "WARN",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
_QUIET = {"DYN_LOG": "error", "DYNAMO_SKIP_PYTHON_LOG_INIT": "1"}
"""The second: Dynamo 1.6 logs a line for each call at any level."""
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
_HERE = ("localhost", "127.0.0.1", "::1")


def surroundings(environment: Mapping[str, str], *more: Mapping[str, str]) -> dict[str, str]:
    """``more``: servers and folders; the later wins."""
    found = _DEFAULTS | dict(environment) | {"PYTHONHASHSEED": "0", "PYTHONIOENCODING": "utf-8"}
    for each in more:
        found |= each
    return found | past_proxies(found)


def quiet(environment: MutableMapping[str, str]) -> None:
    """For a process whose log nobody reads, before Dynamo is imported. ``DYN_LOG`` of the user shows it."""
    if "DYN_LOG" not in environment:
        environment.update(_QUIET)


def is_noise(line: bytes, environment: Mapping[str, str]) -> bool:
    """A line of Dynamo's for one call, which ``DYN_LOG`` does not ask for."""
    wanted = environment.get("DYN_LOG", "").partition(",")[0].lower()
    return b"request_span" in line and b" INFO" in line and wanted in ("off", "error", "warn")


def past_proxies(environment: Mapping[str, str]) -> dict[str, str]:
    """``no_proxy`` with this machine in it, where there is a proxy: libraries of others read it, too."""
    if not any(environment.get(name) or environment.get(name.upper()) for name in _PROXIES):
        return {}
    named = ",".join(filter(None, (environment.get("no_proxy"), environment.get("NO_PROXY")))).split(",")
    hosts = ",".join(dict.fromkeys(host.strip() for host in [*named, *_HERE] if host.strip()))
    return {"no_proxy": hosts, "NO_PROXY": hosts}
