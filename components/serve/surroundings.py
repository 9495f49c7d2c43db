# SPDX-License-Identifier: Apache-2.0
"""The common environment of a graph's processes. Pure.

The user's variables win, with two exceptions: this machine is never reached over a proxy, and output is UTF-8, which
the launcher reads.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

_DEFAULTS = {
    # Dynamo's wait before a worker's drain, in which frontends notice its end.
    "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": "1",
    "DYN_EVENT_PLANE": "zmq",
    # The second part hides a warning that a text model "is not supported" by the routing of images.
    "DYN_LOG": "warn,mm_routing=off",
    "NIXL_LOG_LEVEL": "WARN",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
_HERE = ("localhost", "127.0.0.1", "::1")


def surroundings(environment: Mapping[str, str], *more: Mapping[str, str]) -> dict[str, str]:
    """The environment. ``more``: servers and folders; later ones win."""
    found = _DEFAULTS | dict(environment) | {"PYTHONHASHSEED": "0", "PYTHONIOENCODING": "utf-8"}
    for each in more:
        found |= each
    return found | past_proxies(found)


def quiet(environment: MutableMapping[str, str]) -> None:
    """Silence Dynamo's log, before its import, unless ``DYN_LOG`` asks for more than errors and warnings."""
    if _is_quiet(environment.setdefault("DYN_LOG", "error")):
        # Dynamo 1.6 logs a line for each call at any level.
        environment["DYNAMO_SKIP_PYTHON_LOG_INIT"] = "1"


def is_noise(line: bytes, environment: Mapping[str, str]) -> bool:
    """True for Dynamo's log line of one call, which ``DYN_LOG`` does not request."""
    return b"request_span" in line and b" INFO" in line and _is_quiet(environment.get("DYN_LOG", ""))


def _is_quiet(log: str) -> bool:
    return log.partition(",")[0].lower() in ("off", "error", "warn")


def past_proxies(environment: Mapping[str, str]) -> dict[str, str]:
    """``no_proxy`` with this machine, where a proxy is set; other libraries read it too."""
    if not any(environment.get(name) or environment.get(name.upper()) for name in _PROXIES):
        return {}
    named = ",".join(filter(None, (environment.get("no_proxy"), environment.get("NO_PROXY")))).split(",")
    hosts = ",".join(dict.fromkeys(host.strip() for host in [*named, *_HERE] if host.strip()))
    return {"no_proxy": hosts, "NO_PROXY": hosts}
