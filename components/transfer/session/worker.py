# SPDX-License-Identifier: Apache-2.0
"""The one thread that moves an agent's blocks: it steps all transfers in turn.

Life cycle: ``start``, ``submit`` from any thread, ``stop`` (what flies is cancelled). The worker owns every
deadline: it throws ``DeadlineExceeded`` or ``TransferCancelled`` into a transfer and gives it ``grace_s`` more
to stand still; after that it is dropped and its blocks are reported as poisoned. No handle stays unsettled.
"""

from __future__ import annotations

import ctypes
import logging
import queue
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass

from components.errors import DeadlineExceeded, MigrateError, TransferCancelled, TransferError
from components.transfer.config import TransferResult
from components.transfer.data.base import Backend, Steps
from components.transfer.handle import TransferHandle

logger = logging.getLogger(__name__)

_BUSY_S = 10e-6
"""Pause of a thread that waits for a peer: far below the time of a chunk, long enough to let others have the GIL."""
_SLACK_NS = 1000
"""Linux rounds every pause up by 50 us unless a thread asks for less."""
_PR_SET_TIMERSLACK = 29
_STEP_S = 60e-6
"""Longest pause while something is under way: a staged chunk waits for five or six of them."""
_ALERT_S = 100e-6
_ALERT_FOR_S = 0.5
"""For so long after the last transfer a next one is expected soon."""
_IDLE_S = 1e-3
_QUIET_AFTER_S = 2.0
_QUIET_S = 4e-3
"""Nobody has moved anything for a while: each look at the peers takes the GIL from the engine's steps."""


@dataclass
class Job:
    """One transfer that is being stepped."""

    steps: Steps
    handle: TransferHandle
    end: float
    failed: MigrateError | None = None


class Worker:
    """See the module docstring."""

    def __init__(self, name: str, grace_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._grace_s = grace_s
        self._clock = clock
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._jobs: list[Job] = []
        self._services: list[Generator[bool, None, None]] = []
        self._backends: list[Backend] = []
        self._last_work = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"kv-{name}"[:15], daemon=True)

    def start(self, backends: list[Backend]) -> None:
        """Begin to step transfers and to answer peers."""
        self._backends = backends
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Hand a transfer over. After ``stop`` it fails at once."""
        if self._stopping.is_set():
            job.handle.settle(None, TransferError("the agent is closed"))
            return
        self._queue.put(job)

    def stop(self, timeout_s: float = 5.0) -> None:
        """End all transfers, and the thread."""
        self._stopping.set()
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        _fine_timer()
        pause = _BUSY_S
        while True:
            worked = self._take(block=not self._jobs and not self._services)
            worked |= self._progress()
            worked |= self._step_services()
            worked |= self._step_jobs()
            if self._stopping.is_set() and not self._jobs:
                self._drain()
                return
            if worked:
                pause, self._last_work = _BUSY_S, self._clock()
            elif self._jobs or self._services:
                time.sleep(pause)
                pause = min(pause * 1.1, _STEP_S)

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
                taken = True

    def _pause(self) -> float:
        quiet = self._clock() - self._last_work
        if quiet < _ALERT_FOR_S:
            return _ALERT_S
        return _IDLE_S if quiet < _QUIET_AFTER_S else _QUIET_S

    def _progress(self) -> bool:
        worked = False
        for backend in self._backends:
            try:
                new = backend.progress()
            except Exception:
                # The thread must survive whatever a library raises, or every later transfer hangs.
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
            try:
                worked |= self._step(job)
            except StopIteration as stop:
                self._settle(job, stop.value, job.failed)
            except MigrateError as error:
                self._settle(job, None, error)
            except Exception as error:
                logger.exception("a transfer failed")
                self._settle(job, None, TransferError(f"{type(error).__name__}: {error}"))
        return worked

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
            # The generator names the blocks that are not safe yet, and lets go.
            job.steps.close()
            raise job.failed
        return next(job.steps)

    def _settle(self, job: Job, result: TransferResult | None, error: MigrateError | None) -> None:
        self._jobs.remove(job)
        job.handle.settle(None if error else result, error)

    def _drain(self) -> None:
        while not self._queue.empty():
            if (job := self._queue.get()) is not None:
                job.handle.settle(None, TransferError("the agent is closed"))


def _fine_timer() -> None:
    """Precise pauses for the calling thread, where the system has them."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(_SLACK_NS), 0, 0, 0)
