# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.faults --seed N`` plays one run again; ``--runs N`` plays N and sums them up."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from tests.faults.scenario import run


def main() -> int:
    """Print problems with their seeds; exit 1 when there are any."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("--seed", type=int, default=None, help="play this run only, and show what happened")
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--runs", type=int, default=1000)
    arguments = parser.parse_args()
    if arguments.seed is not None:
        outcome = run(arguments.seed)
        print(outcome)
        return bool(outcome.problems)
    began, bad, requests, moves, failed, flipped = time.time(), 0, 0, 0, 0, 0
    reasons: Counter[str] = Counter()
    for seed in range(arguments.first, arguments.first + arguments.runs):
        outcome = run(seed)
        requests += outcome.requests
        moves += outcome.moves
        failed += outcome.failed_moves
        flipped += outcome.flipped
        reasons += outcome.reasons
        if outcome.problems:
            bad += 1
            print(f"seed {seed}: {outcome.problems} {outcome.faults}", flush=True)
    print(
        f"{arguments.runs} runs, {bad} with problems; {requests} requests, {moves} migrations done, {failed} failed "
        f"and undone, {flipped} bits flipped in flight; {time.time() - began:.0f} s"
    )
    print("not moved because:", dict(reasons.most_common(12)))
    return bool(bad)


sys.exit(main())
