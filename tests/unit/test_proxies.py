# SPDX-License-Identifier: Apache-2.0
"""No client for processes of our own takes a proxy from the environment."""

from __future__ import annotations

import ast
import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from components.doctor.services import services
from components.serve.servers import free_port
from components.serve.surroundings import past_proxies, surroundings
from components.transfer import AgentConfig, KVPool, TransferAgent

ROOT = Path(__file__).parents[2]
CLIENTS = {"httpx": {"get", "post", "stream", "Client", "AsyncClient"}, "openai": {"OpenAI", "AsyncOpenAI"}}
NEEDED = {"httpx": "trust_env", "openai": "http_client"}
DEAD = "http://127.0.0.1:9"


def sources() -> list[Path]:
    folders = ("components", "planner_hooks", "graphs", "benchmarks", "examples", "tests")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def trusting(path: Path) -> Iterator[str]:
    """Calls that would ask the environment for a proxy."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        names |= {node.module} if isinstance(node, ast.ImportFrom) else set()
        if {"requests", "urllib.request", "urllib3"} & names:
            yield f"{path}:{node.lineno} {names}"
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        module, name = ast.unparse(node.func.value), node.func.attr
        given = {keyword.arg for keyword in node.keywords}
        if name in CLIENTS.get(module, ()) and not {NEEDED[module], None} & given:
            yield f"{path}:{node.lineno} {module}.{name}"
        if module.startswith("grpc") and name.endswith("_channel"):
            yield f"{path}:{node.lineno} {module}.{name}"


def test_clients_are_made_without_the_environment() -> None:
    assert [found for path in sources() for found in trusting(path)] == []


def test_what_others_start_from_is_told_to_go_past_the_proxy() -> None:
    assert past_proxies({"no_proxy": "intern"}) == {}
    for name in ("http_proxy", "HTTPS_PROXY", "all_proxy", "grpc_proxy"):
        found = surroundings({name: DEAD, "NO_PROXY": "intern, 127.0.0.1"})
        assert found["no_proxy"] == found["NO_PROXY"] == "intern,127.0.0.1,localhost,::1"


@pytest.fixture
def dead_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, DEAD)
        monkeypatch.setenv(name.upper(), DEAD)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_doctor_reaches_servers_past_a_dead_proxy(dead_proxy: None, etcd_url: str, nats_url: str) -> None:
    found = services({"ETCD_ENDPOINTS": etcd_url, "NATS_SERVER": nats_url}, free_port())
    assert [str(check.state) for check in found] == ["ok", "ok", "ok"]


async def test_agents_meet_in_etcd_past_a_dead_proxy(dead_proxy: None, etcd_url: str) -> None:
    config = AgentConfig(name="a", etcd_endpoints=(etcd_url,), namespace="proxies", backends=("tcp",))
    agent = TransferAgent(config)
    try:
        await asyncio.wait_for(asyncio.to_thread(agent.start, [KVPool("k", torch.zeros(2, 64), 2, 0)]), 60)
    finally:
        agent.close()
