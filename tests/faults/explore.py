# SPDX-License-Identifier: Apache-2.0
"""All runs of moves of one request with up to a number of faults, and many random ones.

A request moves to and fro between two of three workers, with engines of different answers, while its client reads it
through the frontend's double. Its *steps* are the calls between workers and their streams, in order. Each step has at
most one fault (``tests.streams.Fate``); a *plan* lists the steps with faults and reproduces a run. With ``--deviations
2`` every pair of faults runs.

Invariants
    one engine      each token of the answer follows from the tokens before it by one engine, so none comes from an
                    engine that has continued with other tokens; the answer changes its engine at most as often as
                    the request
    progress        the answer is complete, or an error when the frontend has no worker left
    reservations    after all leases every block and seat of every living worker is free

``python -m tests.faults.explore --deviations 2 --mode live``, ``python -m tests.faults.explore --random 10000``
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

from components.engine.paged.model import PagedKV, generator_of, salt_of
from components.engine.protocol import Sampling
from components.errors import WorkerLost
from components.migration.events import Event
from components.migration.messages import Mode, WorkerCall, WorkerOp
from tests.faults import clock
from tests.faults.model import quiet
from tests.streams import Cluster
from tests.virtual import Fate, virtual_agents

Plan = dict[int, Fate]
WORKERS, TOKENS, MOVES = 3, 70, 2
PROMPT = tuple(range(3, 24))
SAMPLING = Sampling(temperature=0.0, max_tokens=TOKENS)
SIZES: dict[str, Any] = {
    **{"num_blocks": 64, "block_size": 4, "max_model_len": 120, "vocab_size": 1000},
    **{"step_s": 0.03, "lease_s": 4.0, "copy_deadline_s": 2.0},
}
DEADLINE_S = 90.0
_ON_STREAM = (Fate.LOST, Fate.KILL_AFTER)
_KILLS = (Fate.KILL_BEFORE, Fate.KILL_AFTER, Fate.KILL_CALLER)
_ON_CALL = tuple(fate for fate in Fate if fate is not Fate.NORMAL)
_FEW = 12
"""Tokens between two moves."""


@dataclass
class Found:
    """Of one run."""

    plan: Plan
    steps: list[WorkerOp] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    moves: int = 0


class Session:
    """One run: ``fate`` is asked for each step, by number and kind."""

    def __init__(self, mode: Mode, fate: Callable[[int, WorkerOp], Fate], seed: int, direct: bool) -> None:
        self._mode = mode
        self._direct = direct
        self._decide = fate
        self._cluster = Cluster("explore", seed)
        self.found = Found({})

    async def play(self) -> Found:
        """Everything."""
        cluster, found = self._cluster, self.found
        await cluster.start(WORKERS, agents=virtual_agents(), direct=self._direct, **SIZES)
        for number, node in enumerate(cluster.nodes):
            # Equal engines that choose different tokens, so that a mixture shows.
            node.engine.options = dataclasses.replace(node.engine.options, seed=number)
        cluster.fate = self._fate  # type: ignore[method-assign]
        answer = asyncio.ensure_future(cluster.complete(PROMPT, SAMPLING))
        moving = asyncio.ensure_future(self._move(answer))
        await asyncio.wait([answer], timeout=DEADLINE_S)
        self._judge(answer)
        answer.cancel()
        moving.cancel()
        await asyncio.gather(answer, moving, return_exceptions=True)
        try:
            await cluster.quiet()
        except Exception as error:
            found.problems.append(f"reservations: {error}")
        await cluster.stop()
        return found

    def _fate(self, op: WorkerOp) -> Fate:
        step = len(self.found.steps)
        self.found.steps.append(op)
        fate = self._decide(step, op)
        if fate is not Fate.NORMAL:
            self.found.plan[step] = fate
        return fate

    async def _move(self, answer: asyncio.Future[Any]) -> None:
        """Move to the second worker, back to the first, and so on."""
        first, second = self._cluster.nodes[:2]
        seen = 0
        while not answer.done() and self.found.moves < MOVES:
            await asyncio.sleep(0.005)
            for node in self._cluster.nodes:
                for leg in node.status.running() if node.alive else ():
                    if len(leg.known()) >= seen + _FEW:
                        seen = len(leg.known())
                        target = second if node is first else first
                        call = WorkerCall(WorkerOp.MIGRATE, leg.request_id, target=target.instance, mode=self._mode)
                        try:
                            self.found.moves += (await node.status.move(call)).ok
                        except Exception as error:
                            self.found.problems.append(f"a move raises {error!r}")

    def _judge(self, answer: asyncio.Future[list[int]]) -> None:
        problems = self.found.problems
        if not answer.done():
            problems.append("progress: the client hangs")
            return
        error = answer.exception()
        if error is not None:
            killed = sum(fate in _KILLS for fate in self.found.plan.values())
            if not (killed and isinstance(error, WorkerLost) and "no untried" in str(error)):
                problems.append(f"progress: {error!r}")
            return
        tokens = answer.result()
        if len(tokens) != TOKENS:
            problems.append(f"progress: {len(tokens)} of {TOKENS} tokens")
        makers = list(self._makers(tokens))
        if not all(makers):
            problems.append(f"one engine: token {makers.index(set())} is of none: {tokens}")
            return
        # A token on which engines agree by chance counts for the one with the fewest changes.
        events = sum((node.requests.events for node in self._cluster.nodes), start=Counter[Event]())
        lives = 1 + self._cluster.repeats + len([f for f in self.found.plan.values() if f in _KILLS])
        lives += events[Event.LANDED] + events[Event.RECOMPUTED]
        if (changes := _changes(makers)) >= lives:
            problems.append(f"one engine: {changes} changes of {lives} lives")

    def _makers(self, tokens: list[int]) -> Iterator[set[int]]:
        """For each token, the engines that would have made it."""
        size = SIZES["block_size"]
        blocks = list(range(SIZES["max_model_len"] // size))
        kv = PagedKV(len(blocks), size, 2, 4, SIZES["vocab_size"])
        for position, token in enumerate(PROMPT):
            kv.write(token, position, blocks)
        for index, token in enumerate(tokens):
            at = len(PROMPT) + index
            made = {
                engine
                for engine in range(WORKERS)
                if kv.next_token(at, blocks, salt_of(SAMPLING, engine), generator_of(SAMPLING, index)) == token
            }
            yield made
            kv.write(token, at, blocks)


def _changes(makers: list[set[int]]) -> int:
    """Least number of changes of the engine."""
    changes, now = 0, makers[0] if makers else set[int]()
    for made in makers:
        if now & made:
            now = now & made
        else:
            changes, now = changes + 1, made
    return changes


def run(mode: Mode, fate: Callable[[int, WorkerOp], Fate], seed: int = 1, direct: bool = False) -> Found:
    """One run in virtual time. Any exception is a finding. ``direct``: engines send each other commits."""
    with quiet():
        session: Session | None = None

        async def main() -> Found:
            nonlocal session
            session = Session(mode, fate, seed, direct)
            return await session.play()

        try:
            return clock.run(main())
        except (Exception, clock.Hang) as error:
            found = session.found if session is not None else Found({})
            found.problems.append(repr(error))
            return found


def planned(mode: Mode, plan: Plan, direct: bool = False) -> Found:
    """The run of a plan."""
    return run(mode, lambda step, _: plan.get(step, Fate.NORMAL), direct=direct)


def following(found: Found) -> list[Plan]:
    """All plans that have one fault more, at a later step."""
    plans = []
    for step in range(max(found.plan, default=-1) + 1, len(found.steps)):
        fates = _ON_STREAM if found.steps[step] is WorkerOp.ATTACH else _ON_CALL
        plans += [{**found.plan, step: fate} for fate in fates]
    return plans


def exhaustively(mode: Mode, deviations: int, direct: bool = False) -> Iterator[Found]:
    """All runs with at most this number of faults, by number; the last ones in mixed order."""
    plans: list[Plan] = [{}]
    for number in range(deviations + 1):
        Random(number).shuffle(plans)
        level = []
        for plan in plans:
            found = planned(mode, plan, direct)
            yield found
            if number < deviations:
                level.append(found)
        plans = [plan for found in level for plan in following(found)]


def randomly(seed: int) -> Found:
    """A run with several faults."""
    chance = Random(seed)
    rate = chance.choice([0.03, 0.1, 0.25])

    def fate(_: int, op: WorkerOp) -> Fate:
        return (
            chance.choice(_ON_STREAM if op is WorkerOp.ATTACH else _ON_CALL) if chance.random() < rate else Fate.NORMAL
        )

    return run(chance.choice(list(Mode)), fate, seed, direct=bool(seed % 2))


def main() -> int:
    """Print broken invariants with their plans; exit 1 when there are any."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.explore")
    parser.add_argument("--deviations", type=int, default=1, help="faults in one run, at most")
    parser.add_argument("--mode", choices=list(Mode), default=None, help="only this one")
    parser.add_argument("--random", type=int, default=0, help="instead: so many runs with faults at random")
    parser.add_argument("--direct", action="store_true", help="engines send each other commits (at random: odd seeds)")
    parser.add_argument("--first", type=int, default=0, help="seed of the first of them")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for each mode; then a sample was played")
    arguments = parser.parse_args()
    bad = 0
    if arguments.random:
        seeds = range(arguments.first, arguments.first + arguments.random)
        series = {"random": ((f"seed {seed}", randomly(seed)) for seed in seeds)}
    else:
        modes = [Mode(arguments.mode)] if arguments.mode else list(Mode)
        series = {m: (("", found) for found in exhaustively(m, arguments.deviations, arguments.direct)) for m in modes}
    for name, runs in series.items():
        began, count, moved, faults = time.time(), 0, 0, 0
        for label, found in runs:
            count += 1
            moved += found.moves
            faults += len(found.plan)
            if found.problems:
                bad += 1
                plan = {step: f"{fate} {found.steps[step]}" for step, fate in found.plan.items()}
                print(f"{name} {label}: {found.problems} {plan}", flush=True)
            if count % 500 == 0:
                print(f"{name}: {count} runs so far, {bad} with problems", flush=True)
            if time.time() - began > arguments.seconds:
                break
        told = f"{count} runs, {moved} moves, {faults} faults"
        print(f"{name}: {told}; {time.time() - began:.0f} s", flush=True)
    print(f"{bad} with problems")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
