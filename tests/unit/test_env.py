# SPDX-License-Identifier: Apache-2.0
"""One module reads the environment; a wrong value gives one sentence with the variable's name."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from components import env
from components.errors import ConfigError

ROOT = Path(__file__).parents[2]
# The list that the planner's log filter is added to.
ELSEWHERE = {"planner/__main__.py": {"'DYN_LOG'"}}


def reads(path: Path) -> set[str]:
    """What a module asks ``os.environ`` for."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.environ.get", "os.getenv"):
            found.add(ast.unparse(node.args[0]))
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
            found |= {ast.unparse(node.slice)} if isinstance(node.ctx, ast.Load) else set()
    return found


def test_only_one_module_reads_the_environment() -> None:
    found = {}
    for folder in ("components", "planner_hooks", "graphs"):
        for path in (ROOT / folder).rglob("*.py"):
            name = str(path.relative_to(ROOT / folder))
            left = reads(path) - ELSEWHERE.get(name, set())
            if left and path != ROOT / "components" / "env.py" and not name.startswith(("router/", "worker/")):
                found[f"{folder}/{name}"] = left
    assert found == {}


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("ETCD_ENDPOINTS", "http://h:2379,nonsense", "HOST:PORT"),
        ("ETCD_ENDPOINTS", "http://h:99999", "0-65535"),
        ("NATS_SERVER", "nats://[::1", "IPv6"),
        ("ETCD_LEASE_TTL", "0", "whole number from 1"),
        ("ETCD_LEASE_TTL", "10s", "whole number from 1"),
        ("ETCD_AUTH_CA", "/no/such.pem", "no such file"),
        ("DYN_NAMESPACE", "a/b", "letters, digits"),
        ("DYN_MIGRATE_COMPONENTS", "backend,a/b", "joined by commas"),
        ("DYN_DISCOVERY_BACKEND", "ectd", "write one of kubernetes, etcd"),
        ("DYN_REQUEST_PLANE", "http", "write one of tcp, nats"),
        ("DYN_MIGRATE_LOG", "verbose", "write one of DEBUG"),
        ("DYN_MIGRATE_METRICS_HOST", "http://h", "host name"),
        ("DYN_MIGRATE_NVTX", "maybe", "write 1 or 0"),
        ("DYN_MIGRATE_REPLICA", "-1", "whole number"),
        ("DYN_MIGRATE_TRANSPORT", "rdma", "write one of auto"),
        ("DYN_MIGRATE_CONFIG", "[1]", "JSON object"),
        ("DYN_MIGRATE_CONFIG", "{", "JSON object"),
    ],
)
def test_a_wrong_value_is_one_sentence_with_the_variables_name(name: str, value: str, told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        env.check({name: value})
    assert str(raised.value).startswith(f"{name} = {value!r}: ") and told in str(raised.value)


def test_a_password_in_an_address_is_not_told() -> None:
    with pytest.raises(ConfigError) as raised:
        env.check({"NATS_SERVER": "nats://me:t0ps3cret@h:x"})
    assert "t0ps3cret" not in str(raised.value) and str(raised.value).startswith("NATS_SERVER")


def test_values_are_read_as_they_are_meant() -> None:
    environment = {
        "ETCD_ENDPOINTS": " http://a:1, [::1]:2 ,",
        "DYN_MIGRATE_LOG": "debug",
        "DYN_MIGRATE_NVTX": "true",
        "DYN_MIGRATE_METRICS_HOST": "[::1]",
        "DYN_SYSTEM_PORT": "81",
        "DYN_NAMESPACE": "",
    }
    env.check(environment)
    assert env.ETCD_ENDPOINTS.read(environment) == ("http://a:1", "[::1]:2")
    assert env.LOG.read(environment) == "DEBUG" and env.NVTX.read(environment) is True
    assert env.METRICS_HOST.read(environment) == "::1" and env.SYSTEM_PORT.read(environment) == 81
    assert env.NAMESPACE.read(environment) == "dynamo"
    assert env.ETCD_LEASE_TTL.read({}) == 0 and env.CONFIG.read({}) == {}


def test_every_variable_is_named_once() -> None:
    names = [variable.name for variable in env.ALL]
    assert len(names) == len(set(names)) and all(variable.meaning for variable in env.ALL)
