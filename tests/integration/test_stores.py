# SPDX-License-Identifier: Apache-2.0
"""Agent records in a real etcd and a real NATS server, which stop and restart."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from components.address import in_url
from components.errors import ConfigError, TransferError
from components.serve.servers import free_port
from components.transfer import AgentConfig, KVPool, TransferAgent
from tests.conftest import etcd_server, nats_server

pytestmark = pytest.mark.integration
BLOCKS = 8


@contextmanager
def agents(*names: str, **more: object) -> Iterator[list[TransferAgent]]:
    """Started agents of one namespace, each with a pool of its own numbers."""
    namespace = str(more.pop("namespace", uuid.uuid4().hex))
    started: list[TransferAgent] = []
    try:
        for number, name in enumerate(names):
            agent = TransferAgent(AgentConfig(name=name, namespace=namespace, **more))  # type: ignore[arg-type]
            agent.start([KVPool("layer.0", torch.full((BLOCKS, 16), float(number)), BLOCKS, 0)])
            started.append(agent)
        yield started
    finally:
        for agent in started:
            agent.close()


def until(condition: Callable[[], object], what: str, timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.05)


def move(dst: TransferAgent, src: TransferAgent) -> int:
    return dst.fetch(src.ref, [1, 2], [3, 4], request_id="r", deadline_s=10).wait(20).bytes


def test_a_plain_etcd_client_in_another_process_reads_the_record(etcd_url: str) -> None:
    namespace = uuid.uuid4().hex
    with agents("one", namespace=namespace, etcd_endpoints=(etcd_url,)) as [agent]:
        code = (
            "import sys, etcd3, msgspec\n"
            "host, _, port = sys.argv[1].rpartition(':')\n"
            "value, _ = etcd3.client(host=host, port=int(port)).get(sys.argv[2])\n"
            "record = msgspec.msgpack.decode(value)\n"
            "print(record['name'], record['epoch'], record['num_blocks'])\n"
        )
        key = f"/dynamo-migrate/{namespace}/agents/one"
        command = [sys.executable, "-c", code, etcd_url.removeprefix("http://"), key]
        # etcd3's generated code is older than what protobuf's C++ part accepts.
        environment = os.environ | {"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
        assert done.stdout.split() == ["one", agent.epoch, str(BLOCKS)], done.stderr


@pytest.mark.parametrize("kind", ["etcd", "nats"])
def test_agents_find_each_other_and_forget_who_left(kind: str, etcd_url: str, nats_url: str) -> None:
    where: dict[str, object] = {"etcd_endpoints": (etcd_url,)} if kind == "etcd" else {"nats_url": nats_url}
    with agents("a", "b", lease_ttl_s=2, **where) as [a, b]:
        until(lambda: "b" in a.known_peers() and "a" in b.known_peers(), "both know each other")
        assert move(b, a) == 2 * 16 * 4
        a.close()
        until(lambda: "a" not in b.known_peers(), "the closed agent is forgotten")


@pytest.mark.parametrize("form", ["[::1]", "localhost", "::1"])
def test_agents_meet_over_ipv6_alone(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    etcd, nats = free_port(), free_port()
    if form == "localhost":
        both_families(monkeypatch)
    where: dict[str, object] = {
        "etcd_endpoints": (f"http://{in_url(form)}:{etcd}",),
        "nats_url": f"nats://{in_url(form)}:{nats}",
        "advertise_host": form,
        "backends": ("tcp",),
    }
    servers = etcd_server(tmp_path / "e", etcd, "::1"), nats_server(tmp_path / "n", nats, "::1")
    with servers[0], servers[1], agents("a", "b", **where) as [a, b]:
        until(lambda: "b" in a.known_peers() and "a" in b.known_peers(), "both know each other")
        assert move(b, a) == 2 * 16 * 4


def both_families(monkeypatch: pytest.MonkeyPatch) -> None:
    """``localhost`` has addresses of both."""
    real = socket.getaddrinfo

    def found(host: object, *more: Any, **how: Any) -> list[Any]:
        hosts = ("::1", "127.0.0.1") if host == "localhost" else (host,)
        return [answer for each in hosts for answer in real(each, *more, **how)]  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", found)


def test_an_etcd_outage_stops_nobody_and_an_empty_etcd_is_filled_again(tmp_path: Path) -> None:
    port = free_port()
    where: dict[str, object] = {
        "lease_ttl_s": 2,
        "etcd_endpoints": (f"http://127.0.0.1:{port}",),
        "namespace": uuid.uuid4().hex,
    }
    with etcd_server(tmp_path / "first", port) as etcd, agents("a", "b", **where) as [a, b]:
        until(lambda: "b" in a.known_peers() and "a" in b.known_peers(), "both know each other")
        etcd.kill()
        etcd.wait()
        time.sleep(3.0)
        assert move(b, a)
        with etcd_server(tmp_path / "second", port), agents("late", **where) as [late]:
            until(lambda: {"a", "b"} <= set(late.known_peers()), "both have published again")
            assert move(late, a)


def test_a_nats_outage_stops_nobody(tmp_path: Path) -> None:
    port = free_port()
    where: dict[str, object] = {"lease_ttl_s": 2, "nats_url": f"nats://127.0.0.1:{port}"}
    with nats_server(tmp_path / "first", port) as nats, agents("a", "b", **where) as [a, b]:
        until(lambda: "b" in a.known_peers() and "a" in b.known_peers(), "both know each other")
        nats.kill()
        nats.wait()
        time.sleep(3.0)
        assert move(b, a)
        with nats_server(tmp_path / "second", port):
            until(lambda: "b" in a.known_peers() and "a" in b.known_peers(), "both are back")
            assert move(a, b)


def test_news_come_over_nats_before_etcd_tells(etcd_url: str, nats_url: str) -> None:
    with agents("a", "b", etcd_endpoints=(etcd_url,), nats_url=nats_url) as [a, b]:
        until(lambda: "b" in a.known_peers() and "a" in b.known_peers(), "both know each other")
        assert move(b, a)


def test_an_unreachable_store_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.transfer.control.publisher.PUBLISH_S", 1.0)
    address = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(TransferError, match=address), agents("a", etcd_endpoints=(address,)):
        pass
    missing = str(tmp_path / "no-such.pem")
    with pytest.raises(ConfigError, match="no-such.pem"), agents("a", etcd_endpoints=(address,), etcd_ca=missing):
        pass
