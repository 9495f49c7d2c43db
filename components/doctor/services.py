# SPDX-License-Identifier: Apache-2.0
"""Checks the servers and ports that a graph needs. Each check ends within seconds; nothing is raised.

Servers named in the environment must answer. Without such names ``dynamo serve`` starts its own and needs the
programs.
"""

from __future__ import annotations

import shutil
import socket
import ssl
from collections.abc import Callable, Mapping

import httpx

from components import env
from components.address import Address
from components.doctor.check import Check, State, checked
from components.errors import ConfigError
from components.serve.servers import answers
from components.transfer.control.endpoint import Endpoint, without_secrets

_S = 2.0


def services(environment: Mapping[str, str], port: int) -> list[Check]:
    """All lines about servers and ports, and about variables with wrong values."""
    try:
        env.check(environment)
    except ConfigError as error:
        return [Check("variables", State.FAIL, str(error), "correct it, or unset it"), _port(port)]
    etcd = _servers("etcd", env.ETCD_ENDPOINTS, "etcd", "etcd-server", environment, _etcd)
    nats = _servers("NATS", env.NATS_SERVER, "nats-server", "nats-server", environment, _nats)
    return [etcd, nats, _port(port)]


def _servers(
    name: str,
    variable: env.Variable[tuple[str, ...]],
    program: str,
    package: str,
    environment: Mapping[str, str],
    ask: Callable[[str, Mapping[str, str]], str],
) -> Check:
    named = variable.read(environment)
    if not named:
        return _program(name, program, package, variable.name)
    found, failed = [], []
    for url in named:
        try:
            found.append(ask(url, environment))
        except (httpx.HTTPError, OSError, ValueError, KeyError, ConfigError) as error:
            failed.append(f"{without_secrets(url)}: {error or type(error).__name__}")
    if failed:
        fix = f"start it, or correct {variable.name}; unset, dynamo serve starts one of its own"
        return Check(name, State.FAIL if not found else State.WARN, "; ".join(failed), fix)
    return Check(name, State.OK, "; ".join(found))


def _etcd(named: str, environment: Mapping[str, str]) -> str:
    endpoint = Endpoint.of(named)
    verify: ssl.SSLContext | bool = True
    if endpoint.secure:
        verify = ssl.create_default_context(cafile=env.ETCD_AUTH_CA.read(environment) or None)
        if certificate := env.ETCD_AUTH_CLIENT_CERT.read(environment):
            verify.load_cert_chain(certificate, env.ETCD_AUTH_CLIENT_KEY.read(environment) or None)
    url = f"{'https' if endpoint.secure else 'http'}://{Address(endpoint.host, endpoint.port)}/version"
    version = httpx.get(url, timeout=_S, verify=verify, trust_env=False).json()["etcdserver"]
    return f"{without_secrets(named)} is {version}"


def _nats(named: str, _: Mapping[str, str]) -> str:
    where = Address.of(named, 4222)
    with socket.create_connection(where, timeout=_S) as link:
        link.settimeout(_S)
        if not link.recv(4096).startswith(b"INFO "):
            raise ValueError("what answers there is no NATS server")
    return str(where)


def _program(name: str, program: str, package: str, variable: str) -> Check:
    path = shutil.which(program)
    found = f"{variable} is not set; {path} will be started" if path else f"no {program}"
    return checked(
        name, bool(path), found, f"apt-get install {package}, or name a running one in {variable}", State.FAIL
    )


def _port(port: int) -> Check:
    free = not answers("127.0.0.1", port, 0.5)
    found = f"{port} is {'free' if free else 'in use'}"
    return checked("HTTP port", free, found, f"stop what listens on {port}, or use --port")
