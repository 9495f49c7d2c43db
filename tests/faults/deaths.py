# SPDX-License-Identifier: Apache-2.0
"""Deaths in every state of a session, in virtual time: ``python -m tests.faults.deaths --runs 1000``.

Each seed is a run: real engines and migration code on three decode and one or two prefill workers, clients of two
frontends, moves in all modes, late and doubled calls, lost answers, failing copies. When a session passes the run's
state, one process dies. Seeds go through all pairs of state and victim in turn. Invariants:

1. A client gets all tokens of an undisturbed run while its frontend lives. Without any prefill worker Dynamo's
   frontend refuses new requests, and fails a repeat that was requested just before.
2. All living processes are idle afterwards: no block, request or life is left, and no task has failed.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
import time
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from random import Random
from typing import Any
from unittest import mock

from components.engine.kv import RequestId
from components.engine.protocol import GenerateRequest, Sampling
from components.errors import WorkerLost
from components.migration import requests
from components.migration.messages import Mode
from tests.faults.agent import VirtualAgent, Wire
from tests.faults.clock import run
from tests.faults.model import quiet
from tests.paged import new_engine
from tests.streams import Cluster, Node
from tests.virtual import State

CLIENTS = 6
TOKENS = 70
_ENGINE: dict[str, Any] = {"step_s": 0.001, "num_blocks": 128, "lease_s": 5.0, "copy_deadline_s": 2.0}
_ENGINE["integrity"] = "full"  # Bits flip in any block.
_LIMIT_S = 300.0
_REST_S = 20.0
_ON_THE_WAY_S = 0.06
"""A frontend that was asked to repeat a request has been answered by then; a call takes 0.05 s at most."""


class Victim(StrEnum):
    """The victim. ``THIRD`` is the decode worker outside the session."""

    SOURCE = "source"
    DESTINATION = "destination"
    THIRD = "third"
    PREFILL = "prefill"
    FRONTEND = "frontend"


PAIRS = list(itertools.product(State, Victim))
_DECODES = (Victim.SOURCE, Victim.DESTINATION, Victim.THIRD)


@dataclass
class Outcome:
    """Of one run."""

    seed: int
    state: State
    victim: Victim
    died: bool = False
    moves: int = 0
    repeats: int = 0
    whole: int = 0
    cut: int = 0
    """Clients of the dead frontend."""
    refused: int = 0
    """Requests without any prefill worker left."""
    problems: list[str] = field(default_factory=list)


def prompt_of(client: int) -> tuple[int, ...]:
    """Different ones, of more than one block."""
    return tuple(range(3 + client, 24 + 2 * client))


def sampling_of(client: int, seeded: bool) -> Sampling:
    """Greedy, or with a random generator that moves with the request."""
    if seeded and client % 2:
        return Sampling(temperature=0.9, seed=client, max_tokens=TOKENS, ignore_eos=True)
    return Sampling(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)


@cache
def undisturbed(client: int, seeded: bool) -> list[int]:
    """A client's answer when nothing happens."""

    async def alone() -> list[int]:
        engine = new_engine("alone", "alone", lambda config: VirtualAgent(Wire(), config), **_ENGINE)
        await engine.start()
        request = GenerateRequest(RequestId("r"), prompt_of(client), sampling_of(client, seeded))
        tokens = [token async for output in engine.generate(request) for token in output.token_ids]
        await engine.stop()
        return tokens

    return run(alone())


class Run:
    """See the module docstring."""

    def __init__(self, seed: int) -> None:
        self.outcome = Outcome(seed, *PAIRS[seed % len(PAIRS)])
        self._chance = Random(seed)
        self._countdown = self._chance.randint(1, 4)
        # What the frontend repeats after a loss is equal where sampling has no state.
        self._seeded = self.outcome.victim not in _DECODES and self._chance.random() < 0.5
        self._answers: list[list[int]] = [[] for _ in range(CLIENTS)]
        self._clients: list[asyncio.Task[list[int]]] = []
        self._ended: dict[int, float] = {}

    async def play(self) -> Outcome:
        """Everything."""
        chance, outcome = self._chance, self.outcome
        wire = Wire()
        wire.chance = chance
        if chance.random() < 0.3:
            wire.fail, wire.hang, wire.flip = 0.1, 0.02, 0.1
        faults = {"late": 0.1, "double": 0.1, "lost answer": 0.05} if chance.random() < 0.6 else {}
        self._cluster = Cluster(f"deaths-{outcome.seed}", outcome.seed, faults)
        # Lives that wait for their repeat are given up: what is computed again is equal where sampling has no state.
        impatient = not self._seeded and chance.random() < 0.3
        self._cluster.orphan_s = 0.004 if impatient else 1.0
        agents = {"agents": lambda config: VirtualAgent(wire, config), "direct": bool(outcome.seed % 2)}
        self._cluster.at = self._pass
        sweeps = mock.patch.object(requests, "_SWEEP_S", 0.002 if impatient else requests._SWEEP_S)
        sweeps.start()
        try:
            async with asyncio.timeout(_LIMIT_S):
                await self._cluster.start(3, chance.randint(1, 2), **agents, **_ENGINE)
                await self._serve()
                await self._rest()
        except TimeoutError:
            outcome.problems.append(f"hangs: {[len(answer) for answer in self._answers]} tokens of {TOKENS}")
        finally:
            sweeps.stop()
            await self._cluster.stop()
        outcome.repeats = self._cluster.repeats
        return outcome

    async def _serve(self) -> None:
        for client, tokens in enumerate(self._answers):
            asked = self._cluster.complete(prompt_of(client), sampling_of(client, self._seeded), tokens=tokens)
            self._clients.append(asyncio.ensure_future(self._timed(client, asked)))
        moves: list[asyncio.Task[Any]] = []
        while not all(client.done() for client in self._clients):
            await asyncio.sleep(self._chance.uniform(0.0, 0.008))
            mode = self._chance.choice([Mode.LIVE, Mode.LIVE, Mode.STOP_AND_COPY, Mode.REPLAY])
            moves.append(asyncio.ensure_future(self._cluster.move(mode)))
        ended = await asyncio.gather(*moves)
        self.outcome.moves = sum(record is not None and record.ok for record in ended)
        for client, task in enumerate(self._clients):
            self._judge(client, task)

    async def _timed(self, client: int, answer: Coroutine[Any, Any, list[int]]) -> list[int]:
        try:
            return await answer
        finally:
            self._ended[client] = time.monotonic()

    def _pass(self, state: State, source: int, destination: int) -> None:
        outcome = self.outcome
        if outcome.died or state is not outcome.state:
            return
        self._countdown -= 1
        if self._countdown > 0:
            return
        if outcome.victim is Victim.FRONTEND:
            outcome.died = True
            for client in self._clients[::2]:
                client.cancel()
            return
        nodes = {node.instance: node for node in self._cluster.nodes}
        chosen: Node | None
        match outcome.victim:
            case Victim.SOURCE:
                chosen = nodes.get(source)
            case Victim.DESTINATION:
                chosen = nodes.get(destination)
            case Victim.THIRD:
                chosen = next((n for i, n in nodes.items() if i not in (source, destination)), None)
            case _:
                chosen = self._chance.choice(self._cluster.prefills)
        if chosen is not None:
            outcome.died = True
            asyncio.ensure_future(chosen.kill())

    def _judge(self, client: int, task: asyncio.Task[list[int]]) -> None:
        outcome, tokens, right = self.outcome, self._answers[client], undisturbed_of(client, self._seeded)
        error = None if task.cancelled() else task.exception()
        if tokens != right[: len(tokens)]:
            outcome.problems.append(f"client {client} got wrong tokens: {tokens} instead of {right}")
        elif task.cancelled():
            outcome.cut += 1
        elif error is None:
            outcome.whole += 1
            if tokens != right:
                outcome.problems.append(f"client {client} got {len(tokens)} of {len(right)} tokens and no error")
        elif self._may_refuse(client, error):
            outcome.refused += 1
        else:
            outcome.problems.append(f"client {client} lost its request after {len(tokens)} tokens: {error!r}")

    def _may_refuse(self, client: int, error: BaseException) -> bool:
        nobody = not any(node.alive for node in self._cluster.prefills)
        died_at = self._cluster.prefills[0].died_at
        asked = not self._answers[client] or self._ended[client] - died_at < _ON_THE_WAY_S
        return nobody and asked and isinstance(error, WorkerLost)

    async def _rest(self) -> None:
        end = time.monotonic() + _REST_S
        alive = [node for node in self._cluster.everybody if node.alive]
        while left := [what for node in alive for what in await _left(node)]:
            if time.monotonic() > end:
                self.outcome.problems += left
                return
            await asyncio.sleep(0.1)
        for node in alive:
            await node.engine.check_integrity()


async def _left(node: Node) -> list[str]:
    stats, held = (await node.engine.report())[0], node.requests
    found = [f"{stats.total_blocks - stats.free_blocks} blocks"] if stats.free_blocks != stats.total_blocks else []
    found += [f"request {row.request_id}" for row in (await node.engine.report())[1]]
    found += [f"leg {name}" for name in held.legs]
    found += [f"life of {leg.request_id}" for leg in held.arrivals.lives.values()]
    return [f"{what} left on node {node.instance}" for what in found]


def undisturbed_of(client: int, seeded: bool) -> list[int]:
    """As ``undisturbed``, known before the run's own loop began."""
    return _ANSWERS[client, seeded]


_ANSWERS: dict[tuple[int, bool], list[int]] = {}


def play(seed: int) -> Outcome:
    """One run."""
    for client, seeded in itertools.product(range(CLIENTS), (False, True)):
        if (client, seeded) not in _ANSWERS:
            _ANSWERS[client, seeded] = undisturbed(client, seeded)
    failed: list[str] = []
    with quiet():
        outcome = run(Run(seed).play(), failed.append)
    outcome.problems += failed
    return outcome


def main() -> int:
    """1 when an invariant is broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.deaths")
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    arguments = parser.parse_args()
    began = time.monotonic()
    totals: Counter[str] = Counter()
    died: Counter[tuple[State, Victim]] = Counter()
    for seed in range(arguments.first, arguments.first + arguments.runs):
        outcome = play(seed)
        totals += Counter(
            runs=1,
            bad=bool(outcome.problems),
            moves=outcome.moves,
            repeats=outcome.repeats,
            whole=outcome.whole,
            cut=outcome.cut,
            refused=outcome.refused,
            deaths=outcome.died,
        )
        died[outcome.state, outcome.victim] += outcome.died
        for problem in outcome.problems:
            print(f"seed {seed}: {outcome.victim} dies at {outcome.state!r}: {problem}", flush=True)
    print(
        f"{totals['runs']} runs, {totals['bad']} with problems; {totals['deaths']} deaths, in "
        f"{sum(map(bool, died.values()))} of {len(PAIRS)} pairs of state and victim; {totals['moves']} migrations, "
        f"{totals['repeats']} repeats; {totals['whole']} answers whole, {totals['cut']} of dead frontends, "
        f"{totals['refused']} without a prefill worker; {time.monotonic() - began:.0f} s"
    )
    if never := [f"{victim} at {state}" for (state, victim), count in died.items() if not count]:
        print(f"nobody died as {', '.join(never)}")
    return bool(totals["bad"])


if __name__ == "__main__":
    sys.exit(main())
