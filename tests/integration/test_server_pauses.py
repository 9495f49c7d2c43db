# SPDX-License-Identifier: Apache-2.0
"""etcd or NATS is stopped for a minute (SIGSTOP) under clients and moves, then continued.

Processes with a lease in etcd longer than the pause are not affected. With a shorter lease Dynamo's runtime ends them
when etcd continues: clients may get an error then, but no wrong token, and everything recovers.
"""

from __future__ import annotations

import threading
import time
from itertools import count
from pathlib import Path

import pytest

from tests.faults.real.__main__ import undisturbed
from tests.faults.real.run import PROMPTS, REST_S, Run
from tests.faults.real.system import Answer, System

pytestmark = [pytest.mark.integration, pytest.mark.slow]
PAUSE_S = 60.0
_CLIENTS = 2


@pytest.mark.parametrize(("server", "lease_s"), [("nats", 10), ("etcd", 120), ("etcd", 10)])
def test_a_server_that_stands_still_for_a_minute(server: str, lease_s: int, tmp_path: Path) -> None:
    system = System(tmp_path, "paged", lease_s)
    try:
        system.wait()
        expected = undisturbed(system)
        answers: list[tuple[int, Answer]] = []
        over = threading.Event()
        start = time.monotonic()
        numbers = count()

        def client() -> None:
            while not over.is_set():
                number, answer = next(numbers) % PROMPTS, Answer()
                answers.append((number, answer))
                began = time.monotonic()
                system.follow(number, answer)
                print(f"after {began - start:.1f} s: {time.monotonic() - began:.1f} s {answer.error}")

        def mover() -> None:
            run = Run(system, expected, seed=1)
            while not over.wait(1.0):
                run.move_some()

        threads = [threading.Thread(target=work) for work in (*[client] * _CLIENTS, mover)]
        for thread in threads:
            thread.start()
        paused = getattr(system, server)
        time.sleep(2.0)
        paused.pause(True)
        time.sleep(PAUSE_S)
        paused.pause(False)
        time.sleep(5.0)
        over.set()
        for thread in threads:
            thread.join(REST_S)
        assert not [thread for thread in threads if thread.is_alive()]
        assert len(answers) > _CLIENTS
        wrong = [(n, a.text, expected[n]) for n, a in answers if not expected[n].startswith(a.text)]
        assert wrong == []
        if server == "nats" or lease_s > PAUSE_S:
            assert [(n, a.error) for n, a in answers if a.error or a.text != expected[n]] == []
        else:
            assert [n for n, a in answers if not a.error and a.text != expected[n]] == []
            # What discovery still shows is of the time before.
            time.sleep(lease_s)
        print(f"{server}, lease {lease_s} s: {len(answers)} answers, {sum(not a.error for _, a in answers)} whole")
        assert system.rest(REST_S) == ""
    finally:
        left = system.close()
    assert left == []
