# SPDX-License-Identifier: Apache-2.0
"""The threads that step a transfer (worker, requesting and waiting thread), and the thread of callbacks."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Generator, Iterator
from types import SimpleNamespace

import pytest

from components.errors import DeadlineExceeded, TransferError
from components.transfer.config import TransferResult
from components.transfer.data.base import Steps
from components.transfer.handle import TransferHandle
from components.transfer.session import thread as module
from components.transfer.session.thread import EAGER, Job, TransferThread


class Idle:
    """A lane on which nothing happens by itself."""

    lane = "idle"
    inline = True

    def progress(self) -> list[Generator[bool, None, None]]:
        return []


@pytest.fixture
def worker() -> Iterator[TransferThread]:
    made = TransferThread("test", grace_s=0.2)
    made.start([Idle()])  # type: ignore[list-item]
    yield made
    made.stop()


def job(steps: Steps, deadline_s: float = 20.0) -> Job:
    return Job(steps, TransferHandle(), time.monotonic() + deadline_s)


def traced(threads: list[str], finished: threading.Event) -> Steps:
    """Waits for an event; notes which threads step it."""
    threads.append(threading.current_thread().name)
    yield True
    while not finished.is_set():
        yield False
    threads.append(threading.current_thread().name)
    return TransferResult(7)


def test_a_caller_that_waits_makes_the_first_and_the_last_step(worker: TransferThread) -> None:
    threads: list[str] = []
    finished = threading.Event()
    finished.set()
    one = job(traced(threads, finished))
    worker.submit(one, inline=True)
    assert threads == ["MainThread"] and not one.handle.done()
    assert one.handle.wait(5).bytes == 7


def test_a_caller_that_waits_too_long_hands_back_to_the_worker(worker: TransferThread) -> None:
    threads: list[str] = []
    finished = threading.Event()
    one = job(traced(threads, finished))
    worker.submit(one, inline=True)
    with pytest.raises(TimeoutError):
        one.handle.wait(0.05)
    finished.set()
    assert one.handle.wait(5).bytes == 7
    assert threads[0] == "MainThread"


def test_callbacks_run_on_the_worker_also_when_the_first_step_fails(worker: TransferThread) -> None:
    def broken() -> Steps:
        raise TransferError("at once")
        yield True

    called: list[str] = []
    one = job(broken())
    one.handle.add_done_callback(lambda _: called.append(threading.current_thread().name))
    worker.submit(one, inline=True)
    with pytest.raises(TransferError, match="at once"):
        one.handle.wait(5)
    assert called == ["kv-test"]


async def test_one_that_is_awaited_ends_by_itself(worker: TransferThread) -> None:
    threads: list[str] = []
    finished = threading.Event()
    one = job(traced(threads, finished))
    worker.submit(one, inline=True)
    asyncio.get_running_loop().call_later(0.05, finished.set)
    assert (await one.handle).bytes == 7
    assert threads == ["MainThread", "kv-test"]


def test_a_deadline_holds_for_steps_on_any_thread(worker: TransferThread) -> None:
    one = job(traced([], threading.Event()), deadline_s=0.02)
    worker.submit(one, inline=True)
    with pytest.raises(DeadlineExceeded):
        one.handle.wait(5)


def test_many_callers_at_once_each_get_their_own(worker: TransferThread) -> None:
    results: list[int] = []

    def run() -> None:
        for _ in range(50):
            finished = threading.Event()
            finished.set()
            one = job(traced([], finished))
            worker.submit(one, inline=True)
            results.append(one.handle.wait(5).bytes)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [7] * 200


def test_a_closed_worker_takes_nothing(worker: TransferThread) -> None:
    worker.stop()
    one = job(traced([], threading.Event()))
    worker.submit(one, inline=True)
    with pytest.raises(TransferError, match="closed"):
        one.handle.wait(5)


@pytest.mark.parametrize("inline", [True, False])
def test_copies_that_run_by_themselves_are_polled_a_tenth_of_the_time(
    monkeypatch: pytest.MonkeyPatch, inline: bool
) -> None:
    pauses: list[float] = []
    enough = threading.Event()

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 20:
            enough.set()

    # Each look at the clock takes 0.1 ms.
    ticks = itertools.count()
    worker = TransferThread("test", grace_s=0.2, clock=lambda: 1e-4 * next(ticks))
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=sleep))
    worker.start([Idle()], EAGER)  # type: ignore[list-item]
    for _ in range(8):
        worker.submit(Job(traced([], threading.Event()), TransferHandle(), 1e9), inline=inline)
    assert enough.wait(20)
    worker.stop()
    longest = max(pauses[10:20])
    assert longest >= 9 * 8e-4 if inline else longest <= EAGER.step_s
