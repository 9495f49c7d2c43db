# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.faults.real --runs N``: N runs, with a new system after some; prints problems with seeds.

``--seconds`` is the time after which no run begins; the next call may continue with ``--first``. ``--json`` adds the
outcomes to a file.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import msgspec

from benchmarks.graph import machine
from tests.faults.real.run import PROMPTS, Outcome, Run
from tests.faults.real.system import Answer, System


def undisturbed(system: System) -> dict[int, str]:
    """The right texts, one request at a time."""
    texts = {}
    for number in range(PROMPTS):
        answer = Answer()
        system.follow(number, answer)
        assert not answer.error, answer.error
        texts[number] = answer.text
    return texts


def play(outcomes: list[Outcome], seeds: list[int], engine: str, each: int, seconds: float = float("inf")) -> None:
    """All runs; the system is started anew after ``each`` of them, and after one with problems."""
    end = time.monotonic() + seconds
    expected: dict[int, str] = {}
    while seeds and time.monotonic() < end:
        batch, seeds = seeds[:each], seeds[each:]
        with tempfile.TemporaryDirectory(prefix="faults-") as folder:
            system = System(Path(folder), engine)
            try:
                system.wait()
                expected = expected or undisturbed(system)
                for seed in batch:
                    if time.monotonic() > end:
                        break
                    outcomes.append(Run(system, expected, seed).play())
                    _tell(outcomes[-1])
                    if outcomes[-1].problems:
                        _keep(system, seed)
                        seeds = batch[batch.index(seed) + 1 :] + seeds
                        break
            finally:
                left = system.close()
            if left:
                outcomes[-1].problems.append(f"processes are left: {left}")


def main() -> int:
    """1 when something did not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.real")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--each", type=int, default=10, help="runs before the system is started anew")
    parser.add_argument("--engine", choices=["paged", "vllm"], default="paged")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no run begins later")
    parser.add_argument("--json", type=Path, default=None, help="a file that gets all outcomes, and keeps those it has")
    arguments = parser.parse_args()
    # Also then the system is taken down.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    began = time.monotonic()
    seeds = list(range(arguments.first, arguments.first + arguments.runs))
    outcomes: list[Outcome] = []
    try:
        play(outcomes, seeds, arguments.engine, arguments.each, arguments.seconds)
    finally:
        if arguments.json:
            _save(outcomes, arguments.engine, arguments.json)
    return _sum_up(outcomes, time.monotonic() - began)


def _tell(outcome: Outcome) -> None:
    what = f"{outcome.whole} of {outcome.answers} answers whole, {outcome.broken} cut short, {outcome.moves} moves"
    print(f"seed {outcome.seed}: {outcome.fault}: {what}, at rest after {outcome.rest_s:.1f} s", flush=True)
    for problem in outcome.problems:
        print(f"  PROBLEM {problem}", flush=True)


def _keep(system: System, seed: int) -> None:
    kept = Path(tempfile.gettempdir()) / f"faults-real-{seed}.log"
    kept.write_bytes(system.log.read_bytes())
    print(f"  the graph's output is in {kept}", flush=True)


def _save(outcomes: list[Outcome], engine: str, path: Path) -> None:
    found = json.loads(path.read_text()) if path.exists() else {"outcomes": []}
    found["machine"] = machine()
    found["outcomes"] += [{"engine": engine, **msgspec.to_builtins(outcome)} for outcome in outcomes]
    path.write_text(json.dumps(found, indent=1) + "\n")


def _sum_up(outcomes: list[Outcome], seconds: float) -> int:
    if not outcomes:
        print("no run")
        return 1
    bad = sum(bool(outcome.problems) for outcome in outcomes)
    totals: Counter[str] = Counter()
    for outcome in outcomes:
        names = ("answers", "whole", "broken", "refused", "moves")
        totals += Counter({name: getattr(outcome, name) for name in names})
    rest = sorted(outcome.rest_s for outcome in outcomes)
    print(
        f"{len(outcomes)} runs, {bad} with problems; {totals['answers']} answers, {totals['whole']} whole, "
        f"{totals['broken']} cut short by the loss of their frontend, {totals['refused']} refused without a prefill "
        f"worker; {totals['moves']} migrations; at rest "
        f"after {statistics.median(rest):.1f} s (median), {rest[-1]:.1f} s at most; {seconds:.0f} s"
    )
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
