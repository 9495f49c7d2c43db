# SPDX-License-Identifier: Apache-2.0
"""A real graph whose launcher or worker is killed leaves nothing: no process, port, file or shared memory."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from components.serve.servers import answers
from tests.integration.graphs import PAGED, Graph

pytestmark = pytest.mark.integration


def wait_for(what: Callable[[], object], timeout_s: float = 120.0) -> None:
    end = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


def running(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def folder() -> Iterator[Path]:
    """For all files of a graph; its path is short enough for vLLM's sockets."""
    with tempfile.TemporaryDirectory(prefix="dm-") as path:
        yield Path(path)


@contextmanager
def killed_at_the_end(tmp_path: Path, folder: Path, *overrides: str) -> Iterator[Graph]:
    """A graph whose launcher is killed at the end, after which nothing may be left."""
    memory = Path("/dev/shm")
    before = set(memory.iterdir())
    graph = Graph(tmp_path, overrides=overrides, TMPDIR=str(folder))
    try:
        graph.wait()
        graph.complete("a", 4)
        yield graph
        family = psutil.Process(graph.process.pid).children(recursive=True)
        shared = set(memory.iterdir()) - before
        assert list(tmp_path.glob("dynamo-migrate-run/*.json")) and list(folder.glob("dynamo-migrate-*"))
        graph.process.kill()
        graph.process.wait()
        wait_for(lambda: not running(family))
        wait_for(lambda: not list(folder.glob("dynamo-migrate-*")) and not shared & set(memory.iterdir()))
        assert not list(tmp_path.glob("dynamo-migrate-run/*"))
        assert not answers("127.0.0.1", graph.port)
        assert "no running system is known" in graph.command("status").stderr
    finally:
        graph.stop()


def test_nothing_stays_of_a_graph_whose_launcher_is_killed(tmp_path: Path, folder: Path) -> None:
    with killed_at_the_end(tmp_path, folder, *PAGED):
        pass


def test_an_engine_ends_with_its_killed_worker_whose_successor_serves_and_all_end_with_the_launcher(
    tmp_path: Path, folder: Path
) -> None:
    with killed_at_the_end(tmp_path, folder, "--DecodeWorker.replicas=1") as graph:
        worker = graph.worker_process(0)
        engines = worker.children(recursive=True)
        assert engines
        os.kill(worker.pid, signal.SIGKILL)
        wait_for(lambda: not running(engines))
        wait_for(lambda: b"restart 1 of 5" in graph.log.read_bytes())
        graph.wait_until_idle(workers=2)
        graph.complete("a", 4)
