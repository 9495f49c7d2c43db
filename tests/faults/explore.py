# SPDX-License-Identifier: Apache-2.0
"""Every way in which one session can go wrong, up to a number of faults: the real code, explored exhaustively.

A session is a request that is prefilled, handed over and moved once, in one of three modes. Its *steps* are the control
calls of the router and the arrivals of its streams, in the order in which they happen. At each step at most one thing
goes wrong (``WHATS``); a *plan* names the steps at which something does. With ``--deviations 2`` every pair of steps
and things is played. Nothing is random: a plan gives the same run again.

Invariants
    one owner       the client gets every token once, in order, and those of an undisturbed request; no two engines
                    run the request while no call was lost or late and nobody stood still
    blocks          without a fault nobody reads a block of a source that does not hold it for the request; with faults
                    such bytes never become a token
    reservations    once all leases are over, every block of every living worker is free
    progress        the request ends within ``DEADLINE_S``; while its router and its client live, whole (or, when all
                    decode workers stand still for longer than the router waits for one, with the error that says so)

``python -m tests.faults.explore --deviations 2``
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

from components.engine.protocol import RequestPhase
from components.messages import Mode, WorkerCall, WorkerOp
from tests.faults.cluster import Answer, Cluster, expected, in_virtual_time, payload
from tests.faults.network import Fate, Host, Weather

DEADLINE_S = 120.0
_DECODE = 2
WHATS = (
    *(fate.value for fate in Fate if fate is not Fate.NORMAL),
    "kill host before",
    "kill host after",
    "kill other",
    "stall host",
    "stall host long",
    "cancel",
    "kill router",
)
_ON_STREAM = ("kill host before", "kill other", "stall host", "stall host long", "cancel", "kill router")
_HARMLESS = {Fate.TWICE.value}
"""Also with these at most one engine runs the request."""
_RUNS = (RequestPhase.WAITING, RequestPhase.PREFILL, RequestPhase.DECODE, RequestPhase.PREEMPTED)
_BODY = payload([(7 * i) % 5000 for i in range(30)], 40, 5)
_RIGHT = expected(_BODY)
Plan = dict[int, str]


@dataclass
class Found:
    """Of one run."""

    plan: Plan
    steps: list[str] = field(default_factory=list)
    """What each step was."""
    problems: list[str] = field(default_factory=list)
    moved: bool = False


class Session:
    """One run of a plan."""

    def __init__(self, plan: Plan, mode: Mode) -> None:
        self._mode = mode
        self.found = Found(plan)
        self._gone = self._router_died = False
        self._pending: tuple[WorkerOp, str] | None = None
        """What is to happen once a call of this kind was handled."""

    async def play(self) -> Found:
        """Everything."""
        self._cluster = cluster = Cluster(Random(1), Weather(), 1, _DECODE, num_blocks=60, integrity="full")
        await cluster.start()
        network = cluster.network
        network.fate, network.on_call, network.on_stream = self._fate, self._on_call, self._on_stream
        watching = None if self._may_overlap() else cluster.job(self._watch())
        answer = asyncio.ensure_future(cluster.ask("r", _BODY))
        cluster.clients.append(answer)
        moving = cluster.job(self._move())
        await asyncio.wait([answer], timeout=DEADLINE_S)
        self._judge(cluster.answers.get("r", Answer()))
        if watching is not None:
            watching.cancel()
        moving.cancel()
        self.found.moved = any(record.ok for record in cluster.router.mover.moves)
        await cluster.rest()
        try:
            await cluster.accounts()
        except Exception as error:
            self.found.problems.append(f"reservations: {error}")
        await cluster.stop()
        return self.found

    async def _move(self) -> None:
        router = self._cluster.router
        while (stream := router.streams.get("r")) is None or len(stream.tokens) < 6:
            await asyncio.sleep(0.002)
        while stream.lock.locked():
            await asyncio.sleep(0.002)
        decode = [w for w in router.pool.workers.values() if w.role == "decode"]
        others = [w for w in decode if stream.owner is None or w is not stream.owner.worker]
        if others:
            await router.mover.move(stream, others[0], self._mode)

    def _judge(self, answer: Answer) -> None:
        problems = self.found.problems
        if not answer.ended and not self._router_died:
            problems.append(f"progress: it hangs after {len(answer.tokens)} of {len(_RIGHT)} tokens")
        if answer.tokens != _RIGHT[: len(answer.tokens)]:
            problems.append(f"one owner: {answer.tokens} instead of {_RIGHT}")
        elif answer.tokens != _RIGHT and not (self._gone or self._router_died):
            problems.append(f"progress: {len(answer.tokens)} of {len(_RIGHT)} tokens: {answer.error or answer.finish}")

    # Invariants while it runs

    def _may_overlap(self) -> bool:
        return bool(set(self.found.plan.values()) - _HARMLESS)

    async def _watch(self) -> None:
        while True:
            running = [i for i, e in self._cluster.engines.items() if any(r.phase in _RUNS for r in await e.requests())]
            if len(running) > 1:
                self.found.problems.append(f"one owner: workers {running} run the request at once")
                return
            self._check_reads()
            await asyncio.sleep(0.0005)

    def _check_reads(self) -> None:
        if self._cluster.wire.read_of_nobody:
            self.found.problems.append("blocks: a copy has read a block that its owner does not hold")

    # Steps

    def _step(self, host: Host, what: str) -> str:
        number = len(self.found.steps)
        self.found.steps.append(f"{what} at {host.component}")
        return self.found.plan.get(number, "")

    def _fate(self, host: Host, call: WorkerCall) -> Fate:
        deviation = self._step(host, call.op)
        if deviation in list(Fate):
            return Fate(deviation)
        if deviation.endswith("after"):
            self._pending = (call.op, deviation)
        elif deviation:
            self._do(deviation, host)
        return Fate.NORMAL

    def _on_call(self, host: Host, call: WorkerCall, when: str) -> None:
        pending = self._pending
        if pending is not None and when == "after" and call.op == pending[0]:
            self._pending = None
            self._do(pending[1], host)

    def _on_stream(self, host: Host) -> None:
        deviation = self._step(host, "stream")
        if deviation in _ON_STREAM:
            self._do(deviation, host)

    def _do(self, deviation: str, host: Host) -> None:
        cluster = self._cluster
        match deviation:
            case "kill host before" | "kill host after":
                cluster.kill(host)
            case "kill other":
                for other in [h for h in cluster.network.hosts.values() if h is not host and self._has(h)]:
                    cluster.kill(other)
            case "stall host" | "stall host long":
                cluster.stall(host, 2.0 if deviation == "stall host" else 30.0)
            case "cancel":
                self._gone = True
                if "r" in cluster.contexts:
                    cluster.contexts["r"].stop()
            case "kill router":
                self._router_died = True
                cluster.kill_router()

    def _has(self, host: Host) -> bool:
        engine = self._cluster.engines.get(host.instance)
        return engine is not None and "r" in engine._live.scheduler.requests


def run(plan: Plan, mode: Mode) -> Found:
    """One run in virtual time; a problem is part of what was found, whatever it is."""
    session = Session(plan, mode)
    in_virtual_time(session.play(), session.found.problems)
    return session.found


def following(found: Found) -> list[Plan]:
    """All plans that have one fault more, at a later step."""
    plans = []
    for step in range(max(found.plan, default=-1) + 1, len(found.steps)):
        whats = _ON_STREAM if found.steps[step].startswith("stream") else WHATS
        plans += [{**found.plan, step: what} for what in whats]
    return plans


class Exploration:
    """All runs of a mode with so many faults at most, by their number; among the last ones in a mixed order."""

    def __init__(self, mode: Mode, deviations: int) -> None:
        self._mode = mode
        self._deviations = deviations
        self.known = 0
        """Runs of the numbers of faults that have been begun."""

    def __iter__(self) -> Iterator[Found]:
        plans: list[Plan] = [{}]
        for number in range(self._deviations + 1):
            self.known += len(plans)
            if number == self._deviations:
                # Stopped early, they are a sample.
                Random(number).shuffle(plans)
            level = []
            for plan in plans:
                found = run(plan, self._mode)
                yield found
                if number < self._deviations:
                    level.append(found)
            plans = [plan for found in level for plan in following(found)]


def main() -> int:
    """Print what does not hold, with its plan; exit 1 when there is any."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.explore")
    parser.add_argument("--deviations", type=int, default=2, help="faults in one run, at most")
    parser.add_argument("--mode", choices=list(Mode), default=None, help="only this one")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for each mode; then a sample was played")
    arguments = parser.parse_args()
    bad = 0
    for mode in [Mode(arguments.mode)] if arguments.mode else list(Mode):
        began, runs, moved = time.time(), 0, 0
        exploration = Exploration(mode, arguments.deviations)
        for found in exploration:
            runs += 1
            moved += found.moved
            if found.problems:
                bad += 1
                plan = {step: (what, found.steps[step]) for step, what in found.plan.items()}
                print(f"{mode}: {found.problems} {plan}", flush=True)
            if time.time() - began > arguments.seconds:
                break
        told = f"{runs} of {exploration.known} runs with up to {arguments.deviations} faults, {moved} of them moved"
        print(f"{mode}: {told} the request; {time.time() - began:.0f} s", flush=True)
    print(f"{bad} with problems")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
