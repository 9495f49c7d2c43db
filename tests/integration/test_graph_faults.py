# SPDX-License-Identifier: Apache-2.0
"""Workers are killed, stopped and drained under running streams: no token is lost and none is wrong."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.integration.graphs import MODEL, PROMPT, Graph

pytestmark = [pytest.mark.integration, pytest.mark.slow]
LENGTH = 1200


def under_way(graph: Graph, prompts: list[str], disturb: Callable[[dict[str, str]], None]) -> list[str]:
    """Texts of requests during which ``disturb`` was called with {request id: worker}, once all decode."""
    with ThreadPoolExecutor(len(prompts) + 1) as pool:
        texts = [pool.submit(graph.complete, prompt, LENGTH, temperature=0) for prompt in prompts]
        end = time.monotonic() + 60
        while time.monotonic() < end:
            status = graph.status()
            decode = {w["worker"] for w in status["workers"] if w["role"] == "decode"}
            where = {s["request_id"]: s["worker"] for s in status["streams"] if s["worker"] in decode}
            if len(where) == len(prompts):
                disturb(where)
                break
        else:
            pytest.fail("the requests did not reach the decode workers")
        return [text.result(180) for text in texts]


def test_a_killed_worker_costs_no_token(graph: Graph) -> None:
    prompts = [f"killed {i} {PROMPT}" for i in range(2)]
    expected = [graph.complete(prompt, LENGTH, temperature=0) for prompt in prompts]

    def kill(where: dict[str, str]) -> None:
        victim = graph.worker_process(graph.replica_of(next(iter(where.values()))))
        for process in [*victim.children(recursive=True), victim]:
            process.kill()

    assert under_way(graph, prompts, kill) == expected
    # The supervisor starts it again; it comes back as a new epoch and can be moved to.
    graph.wait_until_idle(timeout_s=180)


def test_a_stopped_worker_drains_first(graph: Graph) -> None:
    prompts = [f"stopped {i} {PROMPT}" for i in range(2)]
    expected = [graph.complete(prompt, LENGTH, temperature=0) for prompt in prompts]

    def stop(where: dict[str, str]) -> None:
        graph.worker_process(graph.replica_of(next(iter(where.values())))).send_signal(signal.SIGTERM)

    before = len(graph.status()["moves"])
    assert under_way(graph, prompts, stop) == expected
    assert len(graph.status()["moves"]) > before
    graph.wait_until_idle(timeout_s=180)


def test_drain_empties_a_worker_and_undrain_brings_it_back(graph: Graph) -> None:
    prompts = [f"drained {i} {PROMPT}" for i in range(4)]
    expected = [graph.complete(prompt, LENGTH, temperature=0) for prompt in prompts]
    victim: list[str] = []

    def drain(where: dict[str, str]) -> None:
        victim.append(next(iter(where.values())))
        done = graph.command("drain", victim[0])
        assert done.returncode == 0, done.stderr
        assert not [s for s in graph.status()["streams"] if s["worker"] == victim[0]]

    try:
        assert under_way(graph, prompts, drain) == expected
        assert next(w["draining"] for w in graph.status()["workers"] if w["worker"] == victim[0])
    finally:
        graph.command("undrain", victim[0])
    graph.wait_until_idle()


def test_a_client_that_goes_away_frees_its_blocks(graph: Graph) -> None:
    stream = graph.client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
    )
    for number, _ in enumerate(stream):
        if number == 20:
            stream.close()
            break
    graph.wait_until_idle(timeout_s=20)
