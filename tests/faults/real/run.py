# SPDX-License-Identifier: Apache-2.0
"""A run from a seed: streams, migrations and one fault on a real system; then the invariants.

1. Every client has the text of an undisturbed run. The client of a frontend that is killed, or stopped for longer than
   its lease, may have a prefix of it and an error. A client without any token at the loss of the only prefill worker
   may get 503, as from stock Dynamo.
2. Within ``REST_S`` all workers are back, no block is held, no stream is left, and new requests are served.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import psutil

from tests.faults.real.servers import Server
from tests.faults.real.system import LEASE_S, Answer, System, kill

REST_S = 300.0
CLIENT_S = 300.0
PROMPTS = 8
_VICTIMS = ["source", "destination", "PrefillWorker", "Frontend", "Planner", "etcd", "nats"]


@dataclass
class Outcome:
    """Of one run."""

    seed: int
    fault: str = ""
    problems: list[str] = field(default_factory=list)
    answers: int = 0
    whole: int = 0
    broken: int = 0
    """Answers cut short by the death of the frontend."""
    refused: int = 0
    """Requests that came while there was no prefill worker."""
    moves: int = 0
    rest_s: float = 0.0


class Run:
    """See the module docstring."""

    def __init__(self, system: System, expected: dict[int, str], seed: int) -> None:
        self._system = system
        self._expected = expected
        self._chance = Random(seed)
        self._undoing: list[threading.Timer] = []
        self._hold_s = 0.0
        self._may_break = False
        self._may_refuse = False
        self.outcome = Outcome(seed)

    def play(self) -> Outcome:
        """Everything."""
        chance, system, outcome = self._chance, self._system, self.outcome
        numbers = chance.sample(range(PROMPTS), chance.randint(2, 4))
        answers = {number: Answer() for number in numbers}
        victim, act = chance.choice(_VICTIMS), chance.choice(["kill", "kill", "stop", "stop long"])
        before = chance.random() < 0.5
        outcome.fault = f"{act} {victim} {'before' if before else 'during'} migrations"
        moved = len(self._moves())
        threads = [threading.Thread(target=system.follow, args=item) for item in answers.items()]
        for thread in threads:
            thread.start()
        time.sleep(chance.uniform(0.1, 1.2))
        moving = threading.Thread(target=self.move_some)
        if not before:
            moving.start()
            time.sleep(chance.uniform(0.0, 0.3))
        self._hold_s = {"kill": 0.0, "stop": 2.0, "stop long": LEASE_S + 5.0}[act]
        self._harm(victim, act)
        if before:
            moving.start()
        moving.join()
        for timer in self._undoing:
            timer.join()
        for thread in threads:
            thread.join(CLIENT_S)
        self._judge(answers, threads)
        if system.cut_off:
            # What discovery still shows is of the time before.
            time.sleep(LEASE_S)
        begun = time.monotonic()
        left = system.rest(REST_S)
        outcome.rest_s = time.monotonic() - begun
        if left:
            outcome.problems.append(f"not at rest after {REST_S:g} s: {left}")
        outcome.moves = max(0, len(self._moves()) - moved)
        return outcome

    def _moves(self) -> list[Any]:
        status = self._system.ask("status")
        return [move for move in status.get("moves", []) if move["ok"]]

    def move_some(self) -> None:
        """Ask for a migration of up to three streams."""
        decode, running = self._decode()
        for request_id, worker in list(running.items())[: self._chance.randint(1, 3)]:
            others = [other for other in decode if other != worker]
            if others:
                mode = self._chance.choice(["live", "stop-and-copy", "replay"])
                self._system.ask("migrate", request_id, self._chance.choice(others), mode)

    def _decode(self) -> tuple[list[str], dict[str, str]]:
        """Decode workers, and the worker of each request that one of them has."""
        workers = [w for w in self._system.ask("status").get("workers", []) if w["role"] == "decode"]
        running = {row["request_id"]: w["worker"] for w in workers for row in w["requests"]}
        return [w["worker"] for w in workers], running

    def _judge(self, answers: dict[int, Answer], threads: list[threading.Thread]) -> None:
        outcome = self.outcome
        for (number, answer), thread in zip(answers.items(), threads, strict=True):
            right = self._expected[number]
            outcome.answers += 1
            if thread.is_alive():
                outcome.problems.append(f"client {number} hangs after {len(answer.text)} of {len(right)} characters")
            elif not right.startswith(answer.text):
                outcome.problems.append(f"client {number} has another text: {answer.text!r} instead of {right!r}")
            elif answer.text == right and not answer.error:
                outcome.whole += 1
            elif self._may_break and answer.error:
                outcome.broken += 1
            elif self._may_refuse and not answer.text and "503" in answer.error:
                outcome.refused += 1
            else:
                ended = answer.error or answer.finish
                outcome.problems.append(f"client {number} ended at {len(answer.text)} of {len(right)}: {ended}")

    # The fault

    def _harm(self, victim: str, act: str) -> None:
        if victim in ("etcd", "nats"):
            self._harm_server(getattr(self._system, victim), act)
            return
        processes = self._victims(victim)
        if not processes:
            self.outcome.fault += " (nobody there)"
            return
        process = self._chance.choice(processes)
        self._may_break = victim == "Frontend" and act != "stop"
        self._may_refuse = victim == "PrefillWorker"
        if act == "kill":
            kill(process)
            return
        process.send_signal(signal.SIGSTOP)
        self._undo(lambda: _continue(process))

    def _victims(self, victim: str) -> list[psutil.Process]:
        if victim not in ("source", "destination"):
            return self._system.processes(victim)
        decode, running = self._decode()
        busy = set(running.values())
        chosen = [w for w in sorted(decode) if (w in busy) == (victim == "source")] or sorted(decode)
        return self._system.processes("DecodeWorker", self._system.replica_of(chosen[0])) if chosen else []

    def _harm_server(self, server: Server, act: str) -> None:
        if act == "kill":
            empty = self._chance.random() < 0.5
            self.outcome.fault += " and empty it" if empty else ""
            if empty and server.name == "etcd":
                parts = ("PrefillWorker", "DecodeWorker", "Frontend", "Planner")
                self._system.cut_off += [process for part in parts for process in self._system.processes(part)]
            server.kill(empty)
            time.sleep(self._chance.choice([0.0, 1.0, 4.0]))
            server.start()
            # Dynamo's runtime ends a process whose lease is gone; those of clients' streams are among them.
            self._may_break = server.name == "etcd" and empty
            return
        self._may_break = server.name == "etcd" and act == "stop long"
        server.pause(True)
        self._undo(lambda: server.pause(False))

    def _undo(self, action: Callable[[], None]) -> None:
        timer = threading.Timer(self._hold_s, action)
        timer.start()
        self._undoing.append(timer)


def _continue(process: psutil.Process) -> None:
    if process.is_running():
        process.send_signal(signal.SIGCONT)
