# SPDX-License-Identifier: Apache-2.0
"""Workers are killed, stopped and drained under running streams: no token is lost and none is wrong."""

from __future__ import annotations

import signal
import time
from collections import Counter

import pytest

from tests.integration.graphs import PROMPT, Graph

pytestmark = [pytest.mark.integration, pytest.mark.slow]
LENGTH = 2000


def test_a_killed_worker_costs_no_token(graph: Graph) -> None:
    prompts = [f"killed {i} {PROMPT}" for i in range(2)]

    def kill(where: dict[str, str]) -> None:
        victim = graph.worker_process(graph.replica_of(next(iter(where.values()))))
        for process in [*victim.children(recursive=True), victim]:
            process.kill()

    graph.disturbed(prompts, LENGTH, kill, temperature=0)
    # The supervisor starts it again; it comes back as a new epoch and can be moved to.
    graph.wait_until_idle(timeout_s=180)


def test_a_stopped_worker_drains_first(graph: Graph) -> None:
    prompts = [f"stopped {i} {PROMPT}" for i in range(2)]

    def stop(where: dict[str, str]) -> None:
        victim = next(iter(where.values()))
        graph.worker_process(graph.replica_of(victim)).send_signal(signal.SIGTERM)
        leaving, end = {request for request, worker in where.items() if worker == victim}, time.monotonic() + 60
        # The worker that ends takes its list of moves along; the next one knows where a request has been.
        while leaving:
            assert time.monotonic() < end, f"{leaving} did not move: {graph.status()}"
            rows = graph.running()
            leaving -= {request for request in leaving & set(rows) if rows[request].get("moves")}

    graph.disturbed(prompts, LENGTH, stop, temperature=0)
    graph.wait_until_idle(timeout_s=180)


def test_drain_empties_a_worker_with_16_running_requests_and_undrain_brings_it_back(graph: Graph) -> None:
    prompts = [f"drained {i} {PROMPT}" for i in range(32)]
    victim: list[str] = []

    def drain(where: dict[str, str]) -> None:
        victim.append(Counter(where.values()).most_common(1)[0][0])
        moves = graph.ask("drain", victim[0])
        assert list(where.values()).count(victim[0]) >= 16 and moves and not [m for m in moves if not m["ok"]]
        # Tables are up to a second old.
        end = time.monotonic() + 10
        while left := [row for row in graph.running().values() if row["worker"] == victim[0]]:
            assert time.monotonic() < end, left

    try:
        graph.disturbed(prompts, 600, drain, temperature=0)
        assert next(w["draining"] for w in graph.status()["workers"] if w["worker"] == victim[0])
    finally:
        graph.ask("undrain", victim[0])
    graph.wait_until_idle()


def test_a_client_that_goes_away_frees_its_blocks(graph: Graph) -> None:
    graph.leave_early(PROMPT, 20)
    graph.wait_until_idle(timeout_s=20)
