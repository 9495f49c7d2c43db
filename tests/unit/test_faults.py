# SPDX-License-Identifier: Apache-2.0
"""Random faults from seeds: see ``tests/faults``. Play a failed one again: ``python -m tests.faults --seed N``."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from components.messages import Mode
from tests.faults import clock, explore, network
from tests.faults.cluster import Cluster, expected, payload, quiet
from tests.faults.scenario import run

_SHARE = 20


@pytest.mark.parametrize("first", range(0, 60, _SHARE))
def test_no_seed_loses_or_changes_a_token_hangs_or_leaks(first: int) -> None:
    for seed in range(first, first + _SHARE):
        outcome = run(seed)
        assert outcome.problems == [], outcome


@pytest.mark.slow
@pytest.mark.parametrize("first", range(60, 1060, 100))
def test_a_thousand_more(first: int) -> None:
    for seed in range(first, first + 100):
        outcome = run(seed)
        assert outcome.problems == [], outcome


def test_without_faults_no_block_is_read_that_nobody_holds_and_one_engine_runs_the_request() -> None:
    for mode in Mode:
        found = explore.run({}, mode)
        assert (found.problems, found.moved) == ([], True)


@pytest.mark.parametrize("what", ["lost", "twice", "answer lost", "kill host after"])
def test_one_fault_at_any_step_of_a_move(what: str) -> None:
    steps = len(explore.run({}, Mode.STOP_AND_COPY).steps)
    for step in range(steps):
        assert explore.run({step: what}, Mode.STOP_AND_COPY).problems == []


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(Mode))
def test_every_fault_at_every_step(mode: Mode) -> None:
    for found in explore.Exploration(mode, deviations=1):
        assert found.problems == [], found


def test_a_worker_that_stands_still_is_lost_although_discovery_still_lists_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "LEASE_S", 1e9)
    body = payload([1, 2, 3], 60, 5)

    async def play() -> tuple[list[int], str]:
        cluster = Cluster(Random(1), network.Weather(), prefill=0, decode=2)
        await cluster.start()
        asking = cluster.job(cluster.ask("r", body))
        await asyncio.sleep(0.3)
        owner = cluster.router.streams["r"].owner
        assert owner is not None
        cluster.stall(cluster.network.hosts[owner.worker.instance], 1e6)
        answer = await asyncio.wait_for(asking, 120.0)
        await cluster.stop()
        return answer.tokens, answer.error

    with quiet():
        tokens, error = clock.run(play())
    assert (tokens, error) == (expected(body), "")


@pytest.mark.parametrize("prompt", [[1, 2, 3], list(range(100, 160))])
def test_a_prefill_worker_does_it_all_while_no_decode_worker_is_there(prompt: list[int]) -> None:
    bodies = [payload(prompt, 40, 5), payload(prompt, 60, 6)]

    async def play() -> list[tuple[list[int], str]]:
        cluster = Cluster(Random(1), network.Weather(), prefill=1, decode=1)
        await cluster.start()
        asking = [cluster.job(cluster.ask("running", bodies[0]))]
        await asyncio.sleep(0.3)
        for host in cluster.hosts("backend"):
            cluster.kill(host)
        asking.append(cluster.job(cluster.ask("new", bodies[1])))
        answers = await asyncio.wait_for(asyncio.gather(*asking), 120.0)
        await cluster.rest()
        await cluster.accounts()
        await cluster.stop()
        return [(answer.tokens, answer.error) for answer in answers]

    with quiet():
        assert clock.run(play()) == [(expected(body), "") for body in bodies]
