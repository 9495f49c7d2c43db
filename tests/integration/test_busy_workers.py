# SPDX-License-Identifier: Apache-2.0
"""An engine in one long step answers nobody, as one that stands still: only the latter is lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.integration.graphs import Graph

pytestmark = [pytest.mark.integration, pytest.mark.slow]
SILENCE_S = 3
WORDS = " The clock" * 1750
"""3,500 tokens of SmolLM2, in one step: several times the silence on two cores."""


@pytest.fixture(scope="module")
def slow_graph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Graph]:
    folder: Path = tmp_path_factory.mktemp("busy")
    overrides = (f"--Router.silence-s={SILENCE_S}", "--Common.max-num-batched-tokens=4096")
    graph = Graph(folder, overrides=(*overrides, "--Common.enable-prefix-caching=false"), model="smollm2")
    try:
        graph.wait()
        yield graph
    finally:
        left = graph.stop()
    assert left == []


def test_a_long_step_is_not_taken_for_a_lost_worker(slow_graph: Graph) -> None:
    began = time.monotonic()
    slow_graph.complete(f"busy {WORDS}", 4, temperature=0)
    assert time.monotonic() - began > 2 * SILENCE_S, "the host is too fast for this test: a longer prompt"
    assert "was silent" not in slow_graph.log.read_text(errors="replace")


def test_an_engine_that_stands_still_is_lost_and_costs_no_token(slow_graph: Graph) -> None:
    stopped: list[psutil.Process] = []

    def stop(where: dict[str, str]) -> None:
        [worker] = where.values()
        process = slow_graph.worker_process(slow_graph.replica_of(worker))
        for engine in process.children(recursive=True):
            engine.suspend()
            stopped.append(engine)

    try:
        slow_graph.disturbed(["Once upon a time"], 120, stop, temperature=0)
        assert "was silent" in slow_graph.log.read_text(errors="replace")
    finally:
        for engine in stopped:
            engine.resume()
    slow_graph.wait_until_idle()
