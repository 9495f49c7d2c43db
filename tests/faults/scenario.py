# SPDX-License-Identifier: Apache-2.0
"""A run from a seed: weather, requests, migrations and faults; at its end, what must hold.

1. Every client has the tokens of the undisturbed request. Only one that went away, or whose router died, has less;
   what it has is a prefix.
2. Every request ends within ``DEADLINE_S`` of virtual time.
3. Once all is quiet, every block of every living worker is free and the accounts of ``check_integrity`` add up.
4. No task or callback has failed in a way that nobody handles.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from components.messages import Mode, WorkerCall, WorkerOp
from tests.faults.cluster import Answer, Cluster, expected, in_virtual_time, payload
from tests.faults.network import Host, Weather

DEADLINE_S = 240.0
_WEATHERS = [
    Weather(),
    Weather(),
    Weather(latency_s=0.1),
    Weather(lost=0.03, calls_only=True),
    Weather(twice=0.2, calls_only=True),
    Weather(late=0.03, late_s=15.0, calls_only=True),
    Weather(late=0.02, late_s=4.0),
    Weather(overtaken=0.05),
    Weather(lost=0.02, twice=0.1, overtaken=0.05, calls_only=True),
]
_BROKEN_COPIES: list[tuple[str, ...]] = [(), (), ("fail",), ("hang",), ("flip",), ("fail", "flip")]
_OPS = [WorkerOp.OFFER, WorkerOp.LANDING, WorkerOp.EXTEND, WorkerOp.FREEZE, WorkerOp.COMMIT, WorkerOp.RELEASE]


@dataclass
class Outcome:
    """Of one run."""

    seed: int
    problems: list[str] = field(default_factory=list)
    requests: int = 0
    moves: int = 0
    failed_moves: int = 0
    faults: list[str] = field(default_factory=list)
    flipped: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """Why migrations did not happen."""


class Scenario:
    """One run; ``play`` gives its outcome."""

    def __init__(self, seed: int) -> None:
        self._chance = Random(seed)
        self.outcome = Outcome(seed)
        self._gone: set[str] = set()
        self._router_died = False

    async def play(self) -> Outcome:
        """Everything."""
        chance, outcome = self._chance, self.outcome
        weather = chance.choice(_WEATHERS)
        tight = chance.random() < 0.3
        broken = chance.choice(_BROKEN_COPIES)
        # The default compares the last two blocks only: it finds blocks that were given away, not every flipped bit.
        integrity = "full" if "flip" in broken else chance.choice(["full", "tail"])
        decode = chance.choice([2, 2, 3])
        cluster = Cluster(chance, Weather(), 1, decode, num_blocks=60 if tight else 160, integrity=integrity)
        await cluster.start()
        cluster.network.weather = weather
        self._wire(cluster, broken)
        outcome.faults.append(f"integrity {integrity}")
        bodies = {f"r{i}": self._body() for i in range(chance.randint(2, 6))}
        outcome.requests = len(bodies)
        outcome.faults.append(repr(weather))
        clients = {name: cluster.job(self._client(cluster, name, body)) for name, body in bodies.items()}
        cluster.clients += clients.values()
        self._plan(cluster, list(bodies))
        await asyncio.wait(clients.values(), timeout=DEADLINE_S)
        for name, body in bodies.items():
            self._judge(name, cluster.answers.get(name, Answer(ended=self._router_died)), expected(body))
        cluster.network.weather = Weather()
        await cluster.rest()
        try:
            await cluster.accounts()
        except Exception as error:
            outcome.problems.append(f"accounts: {error}")
        outcome.moves = sum(record.ok for record in cluster.router.mover.moves)
        outcome.failed_moves = len(cluster.router.mover.moves) - outcome.moves
        outcome.reasons = Counter(r.reason.split(":")[0] for r in cluster.router.mover.moves if not r.ok)
        outcome.flipped = cluster.wire.flipped
        await cluster.stop()
        return outcome

    def _body(self) -> dict[str, Any]:
        chance = self._chance
        prompt = [chance.randrange(5000) for _ in range(chance.choice([1, 3, 4, 9, 30, 60]))]
        return payload(prompt, chance.randint(1, 80), chance.choice([None, chance.randrange(1000)]))

    async def _client(self, cluster: Cluster, name: str, body: dict[str, Any]) -> None:
        await asyncio.sleep(self._chance.random() * 0.5)
        await cluster.ask(name, body)

    def _judge(self, name: str, answer: Answer, right: list[int]) -> None:
        if not answer.ended:
            self.outcome.problems.append(f"{name} hangs after {len(answer.tokens)} of {len(right)} tokens")
        if answer.tokens != right[: len(answer.tokens)]:
            self.outcome.problems.append(f"{name} has wrong tokens: {answer.tokens} instead of {right}")
        elif answer.tokens != right and name not in self._gone and not self._router_died:
            what = answer.error or answer.finish
            self.outcome.problems.append(f"{name} ended after {len(answer.tokens)} of {len(right)}: {what}")

    # What happens

    def _wire(self, cluster: Cluster, broken: tuple[str, ...]) -> None:
        for kind in broken:
            setattr(cluster.wire, kind, 0.3)
            self.outcome.faults.append(f"copies {kind}")
        cluster.wire.piece_s = self._chance.choice([0.0002, 0.002, 0.01])

    def _plan(self, cluster: Cluster, names: list[str]) -> None:
        chance = self._chance
        for _ in range(chance.randint(1, 5)):
            cluster.job(self._move(cluster, chance.choice(names), chance.random() * 1.2))
        for _ in range(chance.choice([0, 1, 1, 2])):
            act, what = self._fault(cluster, names)
            if chance.random() < 0.6:
                op, when = chance.choice(_OPS), chance.choice(["before", "after"])
                number = chance.randint(1, 3)
                self.outcome.faults.append(f"{what} {when} {op} number {number}")
                self._at_call(cluster, op, when, number, act)
            else:
                delay = chance.random() * 1.2
                self.outcome.faults.append(f"{what} after {delay:.2f} s")
                asyncio.get_running_loop().call_later(delay, act, None)

    async def _move(self, cluster: Cluster, name: str, delay: float) -> None:
        await asyncio.sleep(delay)
        stream = cluster.router.streams.get(name)
        workers = [w for w in cluster.router.pool.workers.values() if w.role == "decode"]
        if stream is None or not workers:
            return
        away = [w for w in workers if stream.owner is None or w is not stream.owner.worker]
        target = self._chance.choice(away or workers)
        await cluster.router.mover.move(stream, target, self._chance.choice(list(Mode)))

    def _fault(self, cluster: Cluster, names: list[str]) -> tuple[Callable[[Host | None], None], str]:
        chance = self._chance
        kind = chance.choice(["kill", "kill", "stall", "stall long", "drain", "cancel", "router"])
        component = chance.choice(["backend", "backend", "backend", "prefill"])

        def victim(host: Host | None) -> Host | None:
            living = cluster.hosts(component)
            return host if host is not None else (chance.choice(living) if living else None)

        def act(host: Host | None) -> None:
            match kind:
                case "cancel":
                    name = chance.choice(names)
                    self._gone.add(name)
                    if name in cluster.contexts:
                        cluster.contexts[name].stop()
                case "router":
                    self._router_died = True
                    cluster.kill_router()
                case "drain":
                    worker = cluster.router.pool.workers.get(host.instance if host else 2)
                    if worker is not None:
                        cluster.job(cluster.router.mover.drain(worker, 30.0)).add_done_callback(lambda t: t.exception())
                        loop = asyncio.get_running_loop()
                        loop.call_later(3.0, setattr, worker, "held_back", False)
                case "kill":
                    if (chosen := victim(host)) is not None:
                        cluster.kill(chosen)
                case _:
                    if (chosen := victim(host)) is not None:
                        cluster.stall(chosen, 2.0 if kind == "stall" else 30.0)

        return act, kind

    def _at_call(
        self, cluster: Cluster, op: WorkerOp, when: str, number: int, act: Callable[[Host | None], None]
    ) -> None:
        left = number
        earlier = cluster.network.on_call

        def on_call(host: Host, call: WorkerCall, at: str) -> None:
            nonlocal left
            earlier(host, call, at)
            if call.op is op and at == when:
                left -= 1
                if left == 0:
                    act(host)

        cluster.network.on_call = on_call


def run(seed: int) -> Outcome:
    """One run in virtual time. A problem is part of the outcome, whatever it is."""
    scenario = Scenario(seed)
    in_virtual_time(scenario.play(), scenario.outcome.problems)
    return scenario.outcome
