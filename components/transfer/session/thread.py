# SPDX-License-Identifier: Apache-2.0
"""The thread that moves an agent's blocks: it steps all transfers in turn.

Life cycle: ``start``, ``submit`` from any thread, ``stop`` (cancels everything in flight). The worker owns every
deadline: it throws ``DeadlineExceeded`` or ``TransferCancelled`` into a transfer and allows it ``grace_s`` to come
to rest; then it drops the transfer and reports its blocks as unsafe. Every handle is settled.
"""

from __future__ import annotations

import ctypes
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import partial

from components.errors import DeadlineExceeded, MigrateError, TransferCancelled, TransferError
from components.transfer.config import TransferResult
from components.transfer.data.base import Backend, Steps
from components.transfer.data.capture import stand_aside
from components.transfer.handle import TransferHandle

logger = logging.getLogger(__name__)

_SLACK_NS = 1000
"""Timer slack of this thread; Linux's default lengthens every pause by 50 us."""
_PR_SET_TIMERSLACK = 29
_LONGER = 1.1
"""Factor between pauses while a transfer runs: its end is noticed late by at most this share."""
_SPIN_S = 1e-3
"""An eager worker polls without pause for this long after an event (a chunk on a GPU takes 0.3 ms)."""
_CROWD = 5
_POLLING_SHARE = 0.1
"""Largest share of time in which this thread polls ``_CROWD`` or more copies that run by themselves: a poll of hundreds
takes as long as some of the engine's steps, and holds the GIL.
"""
_LONGEST_REST_S = 10e-3
_ALERT_FOR_S = 0.5
"""Time after a peer's message in which the next one is expected soon."""
_HELP_S = 5e-3
"""Max time for which a waiting caller steps the transfer itself (1 GB within a GPU takes less than 1 ms)."""
_QUIET_AFTER_S = 2.0


@dataclass(frozen=True)
class PollIntervals:
    """Pauses between polls of peers, and the first and longest ones while a transfer runs, in seconds.

    Each poll takes the GIL from the engine's steps; where all cores are busy, the step waits until this thread has run.
    """

    alert_s: float
    idle_s: float
    quiet_s: float
    """After a while without a message from a peer."""
    busy_s: float
    """After each event: far below the time of a chunk, long enough for others to take the GIL."""
    step_s: float


EAGER = PollIntervals(alert_s=100e-6, idle_s=1e-3, quiet_s=20e-3, busy_s=10e-6, step_s=60e-6)
"""Spends a core to save time: a staged chunk on a GPU waits for five or six of the worker's steps."""
SPARING = PollIntervals(alert_s=1e-3, idle_s=4e-3, quiet_s=50e-3, busy_s=100e-6, step_s=1e-3)
"""For hosts whose cores compute the model. Their lanes, shared memory and NIXL's READ, send no messages."""


@dataclass
class Job:
    """One transfer."""

    steps: Steps
    handle: TransferHandle
    end: float
    failed: MigrateError | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held by the thread that steps it."""
    inline: bool = False
    """The requesting thread makes the first step, and a waiting thread, if any, the last ones."""
    helped: bool = False
    """A waiting thread steps it now: the worker leaves the transfer and the GIL to that thread."""
    ended: Callable[[], None] | None = None
    """Settles the handle; set after the last step."""


class TransferThread:
    """See the module docstring."""

    def __init__(self, name: str, grace_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._grace_s = grace_s
        self._clock = clock
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._jobs: list[Job] = []
        self._services: list[Generator[bool, None, None]] = []
        self._backends: list[Backend] = []
        self._pace = SPARING
        self._last_work = self._last_message = self._last_inline = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"kv-{name}"[:15], daemon=True)

    def start(self, backends: list[Backend], pace: PollIntervals = SPARING) -> None:
        """Begin to step transfers and to answer peers."""
        self._backends = backends
        self._pace = pace
        self._thread.start()

    def submit(self, job: Job, inline: bool = False) -> None:
        """Add a transfer. After ``stop`` it fails at once.

        ``inline``: the calling thread makes the first step, and a thread that waits for the end the last ones.
        """
        if self._stopping.is_set():
            job.handle.settle(None, TransferError("the agent is closed"))
            return
        if inline:
            job.inline, self._last_inline = True, self._clock()
            with job.lock:
                self._advance(job)
            job.handle.step_inline = lambda timeout_s: self._help(job, timeout_s)
        self._queue.put(job)

    def _help(self, job: Job, timeout_s: float) -> None:
        """Step a transfer on a thread that waits for it, which saves the wake-up of another thread."""
        end = self._clock() + min(_HELP_S, timeout_s)
        job.helped = True
        with job.lock:
            while job.ended is None and self._clock() < end:
                if not self._advance(job):
                    os.sched_yield()
            if job.ended is not None:
                job.ended()
        job.helped = False

    def stop(self, timeout_s: float = 5.0) -> None:
        """End all transfers, and the thread."""
        self._stopping.set()
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        _fine_timer()
        stand_aside()
        pause = self._pace.busy_s
        while True:
            began = self._clock()
            waiting = bool(self._services) or not all(job.helped for job in self._jobs)
            worked = self._take(block=not waiting)
            answered = self._progress() | self._step_services()
            worked |= answered | self._step_jobs()
            if self._stopping.is_set() and not self._jobs:
                self._drain()
                return
            if answered:
                self._last_message = self._clock()
            if worked:
                pause, self._last_work = self._pace.busy_s, self._clock()
            elif self._may_spin():
                os.sched_yield()
            elif waiting:
                time.sleep(max(pause, self._rest(self._clock() - began)))
                pause = min(pause * _LONGER, self._pace.step_s)

    def _rest(self, polled_s: float) -> float:
        """Shortest pause after polls that have taken so long."""
        if self._services or len(self._jobs) < _CROWD or not all(job.inline for job in self._jobs):
            return 0.0
        return min(_LONGEST_REST_S, polled_s * (1 / _POLLING_SHARE - 1))

    def _may_spin(self) -> bool:
        """True while peers' messages decide the speed; a copy that runs by itself needs no polling."""
        if self._pace is not EAGER or self._clock() - self._last_work > _SPIN_S:
            return False
        return bool(self._services) or not all(job.inline for job in self._jobs)

    def _take(self, block: bool) -> bool:
        taken = False
        wait = self._pause() if block else 0.0
        while True:
            try:
                job = self._queue.get(block=wait > 0, timeout=wait or None)
            except queue.Empty:
                return taken
            wait = 0.0
            if job is not None:
                self._jobs.append(job)
                taken |= not job.inline

    def _pause(self) -> float:
        # Copies that callers start bring no message, and the callers need the GIL more than this thread does.
        quiet = self._clock() - self._last_message
        if quiet < _ALERT_FOR_S and self._last_message > self._last_inline:
            return self._pace.alert_s
        return self._pace.idle_s if quiet < _QUIET_AFTER_S else self._pace.quiet_s

    def _progress(self) -> bool:
        worked = False
        for backend in self._backends:
            try:
                new = backend.progress()
            except Exception:
                # The thread must survive any exception, or every later transfer hangs.
                logger.exception("lane %s", backend.lane)
                continue
            self._services.extend(new)
            worked |= bool(new)
        return worked

    def _step_services(self) -> bool:
        worked = False
        for service in list(self._services):
            try:
                worked |= next(service)
            except StopIteration:
                self._services.remove(service)
                worked = True
            except Exception:
                logger.exception("a peer's transfer failed")
                self._services.remove(service)
        return worked

    def _step_jobs(self) -> bool:
        worked = False
        for job in list(self._jobs):
            if not job.lock.acquire(blocking=False):
                continue  # A waiting thread steps it.
            try:
                if job.ended is None:
                    worked |= self._advance(job) and not job.inline
                if job.ended is not None:
                    self._jobs.remove(job)
                    job.ended()
            finally:
                job.lock.release()
        return worked

    def _advance(self, job: Job) -> bool:
        """One step. The end is only noted: the thread that settles the handle runs the callbacks."""
        try:
            return self._step(job)
        except StopIteration as stop:
            self._note(job, stop.value, job.failed)
        except MigrateError as error:
            self._note(job, None, error)
        except Exception as error:
            logger.exception("a transfer failed")
            self._note(job, None, TransferError(f"{type(error).__name__}: {error}"))
        return True

    def _step(self, job: Job) -> bool:
        now = self._clock()
        if job.failed is None:
            if job.handle.cancelled or self._stopping.is_set():
                job.failed = TransferCancelled("the transfer was cancelled")
            elif now > job.end:
                job.failed = DeadlineExceeded("the transfer did not end within its deadline")
            else:
                return next(job.steps)
            job.end = now + self._grace_s
            return job.steps.throw(job.failed)
        if now > job.end:
            # On close the generator marks the blocks that are not safe yet.
            job.steps.close()
            raise job.failed
        return next(job.steps)

    def _note(self, job: Job, result: TransferResult | None, error: MigrateError | None) -> None:
        job.ended = partial(job.handle.settle, None if error else result, error)

    def _drain(self) -> None:
        while not self._queue.empty():
            if (job := self._queue.get()) is not None:
                job.handle.settle(None, TransferError("the agent is closed"))


def _fine_timer() -> None:
    """Enable precise pauses for the calling thread, where the system has them."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(_SLACK_NS), 0, 0, 0)
