# SPDX-License-Identifier: Apache-2.0
"""All environment variables of this package: name, type, default, meaning. No other module reads the environment.

An empty variable counts as not set. ``read`` raises ``ConfigError`` with the variable, its value (unless secret) and
the fix. ``check`` reads all of them, so that a wrong one ends a start at once. Variables of Dynamo, vLLM and NIXL that
are only passed on are not here. docs/reference.md is generated from ``ALL``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import msgspec

from components.address import Address, bare
from components.errors import ConfigError

T = TypeVar("T")
NAMESPACE_FORM = re.compile(r"[A-Za-z0-9_.-]{1,200}")


@dataclass(frozen=True)
class Variable(Generic[T]):
    """One variable. ``convert`` raises ``ValueError`` with the fix."""

    name: str
    default: T
    convert: Callable[[str], T]
    meaning: str
    secret: bool = False
    internal: bool = False
    """Set by ``dynamo serve`` for its processes, or by the user who starts them without it."""

    def read(self, environment: Mapping[str, str] | None = None) -> T:
        """Its value, or the default."""
        text = (os.environ if environment is None else environment).get(self.name, "")
        if not text:
            return self.default
        try:
            return self.convert(text)
        except ValueError as error:
            hidden = self.secret or "@" in text
            raise ConfigError(f"{self.name}{'' if hidden else f' = {text!r}'}: {error}") from None


def _addresses(port: int | None = None) -> Callable[[str], tuple[str, ...]]:
    def convert(text: str) -> tuple[str, ...]:
        urls = tuple(filter(None, (url.strip() for url in text.split(","))))
        for url in urls:
            Address.of(url, port)
        return urls

    return convert


def host(text: str) -> str:
    """A host without brackets. Raises ``ValueError`` for other text."""
    found = bare(text)
    if not found or any(mark in found for mark in "/[]@ ") or found.count(":") == 1:
        raise ValueError("write a host name or an address, without scheme and port")
    return found


def _as(kind: type[T] | Any, what: str) -> Callable[[str], T]:
    """A number within bounds or a switch, as msgspec reads text."""

    def convert(text: str) -> T:
        try:
            found: T = msgspec.convert(text, kind, strict=False)
        except msgspec.ValidationError:
            raise ValueError(f"write {what}") from None
        return found

    return convert


def _number(low: int, high: int) -> Callable[[str], int]:
    return _as(Annotated[int, msgspec.Meta(ge=low, le=high)], f"a whole number from {low} to {high}")


def _choice(*known: str, fold: bool = False) -> Callable[[str], str]:
    def convert(text: str) -> str:
        found = text.upper() if fold else text
        if found not in known:
            raise ValueError(f"write one of {', '.join(known)}")
        return found

    return convert


_switch: Callable[[str], bool] = _as(bool, "1 or 0")
_seconds: Callable[[str], float] = _as(Annotated[float, msgspec.Meta(ge=0, lt=86400)], "seconds, from 0 to below 86400")


def _namespace(text: str) -> str:
    if not NAMESPACE_FORM.fullmatch(text):
        raise ValueError("write 1 to 200 letters, digits, '-', '_' and '.'")
    return text


def _file(text: str) -> str:
    if not Path(text).is_file():
        raise ValueError("there is no such file")
    return text


def _components(text: str) -> tuple[str, ...]:
    names = tuple(filter(None, (name.strip() for name in text.split(","))))
    if not names or not all(NAMESPACE_FORM.fullmatch(name) for name in names):
        raise ValueError("names of Dynamo components, joined by commas: backend,prefill")
    return names


def _object(kind: type[T], what: str) -> Callable[[str], T]:
    def convert(text: str) -> T:
        try:
            return msgspec.json.decode(text, type=kind)
        except (msgspec.MsgspecError, UnicodeError) as error:
            raise ValueError(f"write {what} ({error})") from None

    return convert


_VALUES = _object(dict[str, Any], "a JSON object")
_TEXTS = _object(dict[str, str], "a JSON object of texts")


ETCD_ENDPOINTS: Variable[tuple[str, ...]] = Variable(
    "ETCD_ENDPOINTS", (), _addresses(), "URLs of etcd, joined by commas; without them `dynamo serve` starts its own"
)
ETCD_AUTH_USERNAME = Variable("ETCD_AUTH_USERNAME", "", str, "User in etcd")
ETCD_AUTH_PASSWORD = Variable("ETCD_AUTH_PASSWORD", "", str, "Password in etcd", secret=True)
ETCD_AUTH_CA = Variable("ETCD_AUTH_CA", "", _file, "PEM file with the authority of etcd's certificate")
ETCD_AUTH_CLIENT_CERT = Variable("ETCD_AUTH_CLIENT_CERT", "", _file, "PEM file with a certificate for etcd")
ETCD_AUTH_CLIENT_KEY = Variable("ETCD_AUTH_CLIENT_KEY", "", _file, "PEM file with its key")
ETCD_LEASE_TTL = Variable(
    "ETCD_LEASE_TTL",
    0,
    _number(1, 86400),
    "Seconds after which etcd forgets a process that is gone or cut off; without it 20 for whatever holds clients' "
    "streams and 10 for workers",
)
NATS_SERVER: Variable[tuple[str, ...]] = Variable(
    "NATS_SERVER", (), _addresses(4222), "URLs of NATS, joined by commas; without them `dynamo serve` starts its own"
)
NATS_AUTH_USERNAME = Variable("NATS_AUTH_USERNAME", "", str, "User in NATS")
NATS_AUTH_PASSWORD = Variable("NATS_AUTH_PASSWORD", "", str, "Password in NATS", secret=True)
NATS_AUTH_TOKEN = Variable("NATS_AUTH_TOKEN", "", str, "Token for NATS", secret=True)
NATS_AUTH_CREDENTIALS_FILE = Variable("NATS_AUTH_CREDENTIALS_FILE", "", _file, "NATS `.creds` file")
NATS_CA = Variable("DYN_MIGRATE_NATS_CA", "", _file, "PEM file with the authority of the NATS server's certificate")
NAMESPACE = Variable("DYN_NAMESPACE", "dynamo", _namespace, "Dynamo namespace of the graph")
COMPONENTS: Variable[tuple[str, ...]] = Variable(
    "DYN_MIGRATE_COMPONENTS",
    ("backend", "prefill"),
    _components,
    "Dynamo components whose workers migrate requests or hand them over, joined by commas",
)
DISCOVERY = Variable(
    "DYN_DISCOVERY_BACKEND", "etcd", _choice("kubernetes", "etcd", "file", "mem"), "Where Dynamo's processes meet"
)
REQUEST_PLANE = Variable("DYN_REQUEST_PLANE", "tcp", _choice("tcp", "nats"), "How Dynamo carries requests")
SYSTEM_PORT = Variable(
    "DYN_SYSTEM_PORT", -1, _number(-1, 65535), "Port of this process's `/metrics`; -1: none", internal=True
)
SYSTEM_HOST = Variable(
    "DYN_SYSTEM_HOST",
    "",
    host,
    "Where `/metrics` of processes listens; else on loopback, in a graph of several hosts everywhere",
)
SECRET_FILE = Variable(
    "DYN_MIGRATE_SECRET_FILE",
    "",
    str,
    "File with the secret of this system, the same for all processes and commands; see "
    "[security](reliability.md#security)",
)
PAGE_TOKEN = Variable(
    "DYN_MIGRATE_PAGE_TOKEN",
    "",
    str,
    "Token of the web page where it listens beyond loopback; without it one that follows from the secret",
    secret=True,
)
METRICS_HOST = Variable(
    "DYN_MIGRATE_METRICS_HOST", "", host, "Host under which Prometheus reaches the processes of this machine"
)
CACHE = Variable(
    "DYN_MIGRATE_CACHE", "", str, "Folder for prepared models; without it `dynamo-migrate` in the user's cache"
)
LOG = Variable(
    "DYN_MIGRATE_LOG",
    "INFO",
    _choice("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL", fold=True),
    "Least level of this package's log lines",
)
NVTX = Variable("DYN_MIGRATE_NVTX", False, _switch, "NVTX ranges for Nsight Systems; see tuning.md")
TIMELINE = Variable(
    "DYN_MIGRATE_TIMELINE", "", str, "Folder in which processes of one host write when each does what for a move"
)
TRANSPORT = Variable(
    "DYN_MIGRATE_TRANSPORT",
    "auto",
    _choice("auto", "ib", "nvlink", "tcp", "shm"),
    "Lane that KV blocks take; `--nixl-transport` sets it",
    internal=True,
)
AGENT = Variable("DYN_MIGRATE_AGENT", "", str, "Name of a worker's transfer agent; without it one that nobody else has")
HOST = Variable("DYN_MIGRATE_HOST", "127.0.0.1", host, "Address under which other hosts reach a worker")
TRANSFER: Variable[dict[str, Any]] = Variable(
    "DYN_MIGRATE_TRANSFER", {}, _VALUES, "Settings of a worker's transfer agent as a JSON object; see transfer.md"
)
INTEGRITY = Variable(
    "DYN_MIGRATE_INTEGRITY", "tail", _choice("tail", "full", "off"), "Which KV blocks a worker checksums"
)
LEASE_S = Variable(
    "DYN_MIGRATE_LEASE_S", 60.0, _seconds, "Seconds for which a worker keeps a request on the move without a word"
)
DRAIN_S = Variable("DYN_MIGRATE_DRAIN_S", 25.0, _seconds, "Seconds that a worker drains after SIGTERM")
REPEATS = Variable(
    "DYN_MIGRATE_REPEATS",
    True,
    _switch,
    "The frontends' `--migration-limit` is above 0; else a worker that a request has left relays it to its end",
)
LORA_MODULES: Variable[dict[str, str]] = Variable(
    "DYN_MIGRATE_LORA_MODULES", {}, _TEXTS, "LoRA adapters that a worker loads at its start: a JSON object of folders"
)
MODE = Variable(
    "DYN_MIGRATE_MODE",
    "agg",
    _choice("agg", "prefill", "decode"),
    "What a worker of the paged engine does",
    internal=True,
)
COMPONENT = Variable("DYN_MIGRATE_COMPONENT", "", str, "Name of the process's component in its graph", internal=True)
REPLICA = Variable("DYN_MIGRATE_REPLICA", 0, _number(0, 1 << 20), "Its number among its equals", internal=True)
CONFIG: Variable[dict[str, Any]] = Variable(
    "DYN_MIGRATE_CONFIG", {}, _VALUES, "Its configuration: keys of its component as a JSON object", internal=True
)
READY_FILE = Variable("DYN_MIGRATE_READY_FILE", "", str, "File that it makes when it serves", internal=True)
RUNTIME_FOLDER = Variable(
    "XDG_RUNTIME_DIR", "", str, "Folder for the file by which commands find the running graph; else the cache"
)
CACHE_HOME = Variable("XDG_CACHE_HOME", "", str, "The user's cache; without it `.cache` in the home folder")
TORCH_COMPILE_OFF = Variable("TORCHDYNAMO_DISABLE", "1", str, "Of torch: 1 where a worker's engine compiles nothing")
THREADS = Variable("OMP_NUM_THREADS", "1", str, "Threads of an engine without GPUs that compute one operation")
TRACES = Variable("OTEL_EXPORTER_OTLP_ENDPOINT", "", str, "Where traces of requests go; without it there are none")
TRACES_ALONE = Variable("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "", str, "The same for traces alone")

HOME = Variable("HOME", "", str, "Dynamo keeps model cards in `.cache/dynamo/mdc` below it; else in a temporary folder")
SOCKETS = Variable(
    "VLLM_RPC_BASE_PATH", "", str, "Folder for vLLM's sockets, 70 characters at most; `dynamo serve` makes one"
)

ALL: tuple[Variable[Any], ...] = tuple(each for each in list(globals().values()) if isinstance(each, Variable))


def check(environment: Mapping[str, str] | None = None) -> None:
    """Read all. Raises ``ConfigError`` for the first wrong one."""
    for variable in ALL:
        variable.read(environment)


def stores() -> dict[str, Any]:
    """Stores of agents' records, as fields of ``components.transfer.AgentConfig``."""
    return {
        "etcd_endpoints": ETCD_ENDPOINTS.read() or ("http://127.0.0.1:2379",),
        "etcd_user": ETCD_AUTH_USERNAME.read(),
        "etcd_password": ETCD_AUTH_PASSWORD.read(),
        "etcd_ca": ETCD_AUTH_CA.read(),
        "etcd_cert": ETCD_AUTH_CLIENT_CERT.read(),
        "etcd_key": ETCD_AUTH_CLIENT_KEY.read(),
        "nats_url": ",".join(NATS_SERVER.read()),
        "nats_user": NATS_AUTH_USERNAME.read(),
        "nats_password": NATS_AUTH_PASSWORD.read(),
        "nats_token": NATS_AUTH_TOKEN.read(),
        "nats_credentials": NATS_AUTH_CREDENTIALS_FILE.read(),
        "nats_ca": NATS_CA.read(),
        "namespace": NAMESPACE.read(),
        "transport": TRANSPORT.read(),
    }
