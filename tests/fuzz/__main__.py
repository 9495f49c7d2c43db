# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.fuzz --minutes N [target ...]``: each target for N minutes; shrinks and keeps failures.

Minutes are processor time, so that a busy machine gives each target as much. SIGTERM ends all targets with their
results so far.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import resource
import signal
import sys
import threading
import time
from collections import Counter

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz import commits, files, linked, samples, services, wire
from tests.fuzz.inputs import CORPUS, Target, inputs

ALL = [*wire.TARGETS, *services.TARGETS, *commits.TARGETS, *linked.TARGETS, *files.TARGETS]
_BATCH = 500
_stopped = threading.Event()


def play(target: Target, minutes: float, first: int) -> tuple[Counter[bool], bytes | None]:
    """Accepted and refused inputs, and the smallest breaking one, if any."""
    end, counts = time.process_time() + 60 * minutes, Counter[bool]()
    last = b""
    number = first

    def goes_on() -> bool:
        return time.process_time() < end and not _stopped.is_set()

    while goes_on():

        @seed(number)
        @settings(
            max_examples=_BATCH,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(inputs(target))
        def batch(data: bytes) -> None:
            nonlocal last
            if goes_on():
                last = data
                counts[target.feed(data)] += 1

        try:
            batch()
        except Exception as error:
            print(f"{target.name}: {type(error).__name__}: {error}", flush=True)
            return counts, last
        number += 1
    return counts, None


def main() -> int:
    """1 when a target broke; the corpus then has its input."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("targets", nargs="*", help=", ".join(target.name for target in ALL))
    parser.add_argument("--minutes", type=float, default=10.0, help="for each target")
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--samples", action="store_true", help="write valid inputs to the corpus and end")
    arguments = parser.parse_args()
    if arguments.samples:
        for name, found in samples.everything().items():
            (CORPUS / name).mkdir(parents=True, exist_ok=True)
            for number, data in enumerate(found):
                (CORPUS / name / f"valid-{number:02}").write_bytes(data)
        return 0
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGTERM, lambda *_: _stopped.set())
    bad = 0
    for target in ALL:
        if arguments.targets and target.name not in arguments.targets:
            continue
        began = time.process_time()
        counts, broken = play(target, arguments.minutes, arguments.first)
        minutes = (time.process_time() - began) / 60
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        told = f"{counts.total()} inputs, {counts[True]} taken, {counts[False]} refused"
        print(f"{target.name}: {minutes:.1f} minutes, {told}; peak of the process {peak} MiB", flush=True)
        if broken is not None:
            bad += 1
            kept = CORPUS / target.name / f"broke-{hashlib.sha256(broken).hexdigest()[:8]}"
            kept.write_bytes(broken)
            print(f"{target.name} breaks: {broken[:200]!r}; kept as {kept}", flush=True)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
