# SPDX-License-Identifier: Apache-2.0
"""A Prometheus server and a collector of OpenTelemetry traces, for tests."""

from __future__ import annotations

import gzip
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from components.serve.servers import free_port
from tests.conftest import running, wait_for_port


@dataclass(frozen=True)
class Seen:
    """One span as it came over the wire."""

    service: str
    name: str
    trace: str
    span: str
    parent: str
    attributes: dict[str, Any]


class Collector:
    """An OTLP endpoint over HTTP (protobuf) that keeps all spans, between ``start`` and ``stop``."""

    def __init__(self) -> None:
        self.spans: list[Seen] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                if self.path == "/v1/traces":
                    collector.spans += _spans(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def wait_for_name(self, name: str, count: int, timeout_s: float = 60) -> list[Seen]:
        """All spans of that name, once there are ``count``. Fails with what came."""
        end = time.monotonic() + timeout_s
        while True:
            spans = [span for span in list(self.spans) if span.name == name]
            if len(spans) >= count:
                return spans
            assert time.monotonic() < end, self.spans
            time.sleep(0.2)


def _spans(request: ExportTraceServiceRequest) -> Iterator[Seen]:
    for resource in request.resource_spans:
        service = next(a.value.string_value for a in resource.resource.attributes if a.key == "service.name")
        for scope in resource.scope_spans:
            for span in scope.spans:
                attributes = {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}
                ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
                yield Seen(service, span.name, *ids, attributes)


class Prometheus:
    """A running server and its API."""

    def __init__(self, address: str) -> None:
        self._address = address

    def get(self, path: str, **parameters: str) -> Any:
        reply = httpx.get(f"{self._address}/api/v1/{path}", params=parameters, timeout=30, trust_env=False)
        assert reply.status_code == 200, reply.text
        return reply.json()["data"]

    def values(self, expression: str) -> list[float]:
        return [float(series["value"][1]) for series in self.get("query", query=expression)["result"]]

    def up(self) -> int:
        """How many targets have been read."""
        return sum(target["health"] == "up" for target in self.get("targets")["activeTargets"])


@contextmanager
def prometheus(folder: Path, settings: Path, rules: Path, page: str) -> Iterator[Prometheus]:
    """A server with the settings of ``deploy/`` that asks the graph whose web page is ``page``, every second."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("no Prometheus here: apt-get install prometheus")
    config = yaml.safe_load(settings.read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(rules)]
    config["scrape_configs"][0]["http_sd_configs"] = [{"url": f"{page.rstrip('/')}/targets", "refresh_interval": "1s"}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    subprocess.run(["promtool", "check", "config", str(folder / "prometheus.yml")], check=True, capture_output=True)
    port = free_port()
    command = [program, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with running([*command, f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]):
        wait_for_port(port)
        yield Prometheus(f"http://127.0.0.1:{port}")
