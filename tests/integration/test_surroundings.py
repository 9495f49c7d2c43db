# SPDX-License-Identifier: Apache-2.0
"""A graph serves in any environment: IPv6 alone, proxies, an unwritable home, an ASCII pipe."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from components.models import cache_folder
from components.serve.places import LONGEST
from components.serve.servers import free_port
from tests.conftest import etcd_server, nats_server
from tests.integration.graphs import PAGED, Graph

pytestmark = pytest.mark.integration
DEAD = "http://127.0.0.1:9"


def test_a_graph_on_ipv6_with_servers_on_ipv6(tmp_path: Path) -> None:
    etcd, nats = free_port(), free_port()
    hosts = ("Frontend.host=::", "PrefillWorker.advertise-host=::1", "DecodeWorker.advertise-host=[::1]")
    overrides = (*PAGED, *(f"--{host}" for host in hosts))
    where = {"ETCD_ENDPOINTS": f"http://[::1]:{etcd}", "NATS_SERVER": f"nats://[::1]:{nats}"}
    with etcd_server(tmp_path / "e", etcd, "::1"), nats_server(tmp_path / "n", nats, "::1"):
        graph = Graph(tmp_path, overrides=overrides, **where)
        try:
            graph.wait()
            text = graph.complete("a", 4)
            assert f"http://[::]:{graph.port}/v1" in graph.log.read_text()
            graph.client.base_url = f"http://[::1]:{graph.port}/v1/"
            assert graph.complete("a", 4) == text
            assert re.match(r"http://\[::\]:\d+/\?token=", graph.page)
            assert "kv_blocks" in graph.metrics("decode")
        finally:
            graph.stop()


def test_a_graph_among_proxies_without_a_home_and_with_a_long_folder(tmp_path: Path) -> None:
    names = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
    proxies = {name: DEAD for each in names for name in (each, each.upper())}
    folder = tmp_path / ("long-" * 30)
    folder.mkdir()
    graph = Graph(
        tmp_path,
        overrides=PAGED,
        **proxies,
        no_proxy="",
        NO_PROXY="",
        HOME="/proc/nohome",
        DYN_MIGRATE_CACHE=str(cache_folder()),
        TMPDIR=str(folder),
        PYTHONIOENCODING="ascii",
    )
    try:
        graph.wait()
        graph.complete("a", 4)
        assert "HOME = /proc/nohome cannot be written" in graph.log.read_text()
        environment = graph.worker_process(0).environ()
        sockets = Path(environment["VLLM_RPC_BASE_PATH"])
        assert len(str(sockets)) <= LONGEST and sockets.is_dir() and Path(environment["HOME"]).is_dir()
        assert "decode" in graph.command("status").stdout
        left = graph.stop()
        assert not left and not sockets.exists() and not list(folder.glob("dynamo-migrate-*"))
    finally:
        graph.stop()
