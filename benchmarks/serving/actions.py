# SPDX-License-Identifier: Apache-2.0
"""Actions on a system under load: migrations, a rolling restart, a scale-down.

Each action runs on its own thread with an event for the end of the load; it returns its steps. A restarted worker
starts with low priority and gets normal priority when it serves: its start competes with its neighbours for two
cores, while in a cluster it has its own machine. All systems are treated alike.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

from benchmarks.serving.load import Control
from benchmarks.serving.metrics import Event
from benchmarks.serving.parts import Part
from benchmarks.serving.systems import System, raise_priority

Action = Callable[[System, Control | None, threading.Event], list[Event]]
_NICE = 5
_LEAD_S = 3.0
"""Time of undisturbed load before the first action."""


def moves(system: System, control: Control | None, over: threading.Event) -> list[Event]:
    """Move one running request every second to another decode worker."""
    events: list[Event] = []
    chooser = random.Random(0)
    while control is not None and not over.wait(1.0):
        status = control.status()
        decode = [w.worker for w in status.workers if w.role in ("decode", "agg") and not w.cordoned]
        running = [
            (worker.worker, row)
            for worker, row in status.requests()
            if worker.worker in decode and row.output_tokens > 4 and not row.moving
        ]
        if not running or len(decode) < 2:
            continue
        source, row = chooser.choice(running)
        target = chooser.choice([worker for worker in decode if worker != source])
        began = time.perf_counter()
        record = control.migrate(row.request_id, target)
        if record is not None:
            what = "move" if record.ok else f"failed move: {record.code}: {record.reason}"
            events.append(Event(what, began, time.perf_counter()))
    return events


def rolling_restart(system: System, control: Control | None, over: threading.Event) -> list[Event]:
    """SIGTERM to each decode worker in turn; the next one follows when the new one serves.

    Not to the only prefill worker: while there is none, Dynamo's frontend answers with 503.
    """
    events: list[Event] = []
    over.wait(_LEAD_S)
    for part in [part for part in system.workers if part.role != "prefill"]:
        if over.is_set():
            events.append(Event(f"no load left to restart {part.name} under", time.perf_counter(), time.perf_counter()))
            continue
        events += _restart(system, control, part)
        over.wait(2.0)
    return events


def _restart(system: System, control: Control | None, part: Part) -> list[Event]:
    began = time.perf_counter()
    system.terminate(part)
    ended = time.perf_counter()
    system.start(part, nice=_NICE)
    system.wait_ready([part])
    while control is not None and sum(w.stats is not None for w in control.status().workers) < len(system.workers):
        time.sleep(0.2)
    raise_priority(part)
    return [Event(f"{part.name} ends", began, ended), Event(f"{part.name} starts", ended, time.perf_counter())]


def scale_down(system: System, control: Control | None, over: threading.Event) -> list[Event]:
    """SIGTERM to the last decode worker, which stays away."""
    over.wait(_LEAD_S)
    part = [p for p in system.workers if p.role != "prefill"][-1]
    began = time.perf_counter()
    system.terminate(part)
    return [Event(f"{part.name} ends", began, time.perf_counter())]
