# SPDX-License-Identifier: Apache-2.0
"""The whole served graph in seconds: Dynamo's frontend, workers, etcd, NATS and NIXL; no model.

The paged engine computes tokens from its KV bytes: equal text proves the right bytes.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import psutil
import pytest

from tests.integration.graphs import MODEL, PAGED, PROMPT, Graph

pytestmark = pytest.mark.integration
LENGTH = 400


@pytest.fixture(scope="module")
def paged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Graph]:
    graph = Graph(
        tmp_path_factory.mktemp("paged"), overrides=(*PAGED, "--DecodeWorker.max-num-seqs=32"), ETCD_LEASE_TTL="20"
    )
    with graph.served():
        yield graph


def test_openai_client_chat_and_completions(paged: Graph) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 20, "temperature": 0}
    whole = paged.client.chat.completions.create(**body)
    parts = list(paged.client.chat.completions.create(**body, stream=True))
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content != ""
    with pytest.raises(openai.BadRequestError):
        paged.client.completions.create(model=MODEL, prompt="word " * 6000, max_tokens=5)


@pytest.mark.parametrize("mode", ["live", "stop-and-copy", "replay"])
def test_a_migrated_stream_gives_the_text_of_an_unmigrated_one(paged: Graph, mode: str) -> None:
    prompts = [f"{mode} {PROMPT}", f"{mode} again {PROMPT}"]
    moves = []

    def move(where: dict[str, str]) -> None:
        for request, source in where.items():
            moves.append(paged.ask("migrate", request, paged.another(source), mode))

    paged.disturbed(prompts, LENGTH, move, temperature=0.8, seed=3)
    assert [(m["ok"], m["mode"]) for m in moves] == [(True, mode)] * 2, moves
    paged.wait_until_idle()


def test_drain_of_16_running_requests_and_undrain(paged: Graph) -> None:
    prompts = [f"drained {i} {PROMPT}" for i in range(32)]
    victim: list[str] = []

    def drain(where: dict[str, str]) -> None:
        victim.append(Counter(where.values()).most_common(1)[0][0])
        moves = paged.ask("drain", victim[0])
        assert list(where.values()).count(victim[0]) >= 16 and moves and not [m for m in moves if not m["ok"]]

    try:
        paged.disturbed(prompts, 2 * LENGTH, drain, temperature=0)
    finally:
        paged.ask("undrain", victim[0])
    paged.wait_until_idle()


def test_a_client_that_goes_away_frees_its_blocks(paged: Graph) -> None:
    paged.leave_early(PROMPT, 20)
    paged.wait_until_idle(timeout_s=20)


@pytest.mark.parametrize("component", ["PrefillWorker", "DecodeWorker"])
def test_workers_that_stand_still_within_their_lease_cost_no_request(paged: Graph, component: str) -> None:
    """With all of a kind: nobody else could take a request that is given up."""
    stopped = paged.processes(component)
    prompts = [f"{component} stands still {i} {PROMPT}" for i in range(3)]
    for process in stopped:
        process.send_signal(signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        texts = pool.submit(paged.complete_all, prompts, 50, temperature=0)
        time.sleep(8)
        for process in stopped:
            process.send_signal(signal.SIGCONT)
        assert texts.result(60) == paged.complete_all(prompts, 50, temperature=0)
    paged.wait_until_idle()


def test_a_killed_worker_costs_no_token(paged: Graph) -> None:
    prompts = [f"killed {i} {PROMPT}" for i in range(4)]

    def kill(where: dict[str, str]) -> None:
        os.kill(paged.worker_process(paged.replica_of(next(iter(where.values())))).pid, signal.SIGKILL)

    paged.disturbed(prompts, LENGTH, kill, temperature=0)
    paged.wait_until_idle()


@pytest.mark.parametrize("program", ["etcd", "nats-server"])
def test_a_server_that_dies_is_started_again_and_costs_no_token(paged: Graph, program: str) -> None:
    def servers() -> list[psutil.Process]:
        return [c for c in psutil.Process(paged.process.pid).children() if c.name() == program]

    def kill(_: dict[str, str]) -> None:
        [before] = servers()
        before.kill()
        end = time.monotonic() + 20
        while not [s for s in servers() if s != before]:
            assert time.monotonic() < end, f"no new {program}"
            time.sleep(0.2)

    paged.disturbed([f"{program} {i} {PROMPT}" for i in range(2)], LENGTH, kill, temperature=0)
    paged.wait_until_idle()
    assert f"{program} has ended" in paged.log.read_text(errors="replace")
