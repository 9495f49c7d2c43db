# SPDX-License-Identifier: Apache-2.0
"""The NCCL lane between two GPUs: its selection, and peers that die or hang.

Blocks and their bytes are compared for this lane, as for all others, in ``test_two_processes.py``.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from benchmarks.transfer.measure import Pair, fetch, pair
from benchmarks.transfer.peer import Shape
from components.errors import DeadlineExceeded, MigrateError, TransferError
from components.transfer.data.nccl import NcclBackend
from components.transfer.data.nccl_wire import nccl_is_available

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(not nccl_is_available()[0], reason=f"needs NCCL: {nccl_is_available()[1]}"),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: NCCL takes no GPU twice"),
]
LARGE = Shape("large", layers=80, kv_heads=8, head_size=128)
BLOCKS = 400
DEVICES = ("cuda:0", "cuda:1")


@contextmanager
def linked(*backends: str) -> Iterator[tuple[Pair, int]]:
    """A pair and the source's process."""
    before = set(multiprocessing.active_children())
    with pair(LARGE, BLOCKS, DEVICES, backends=backends) as case:
        (child,) = set(multiprocessing.active_children()) - before
        assert child.pid is not None
        yield case, child.pid


def compared(case: Pair, count: int) -> str:
    src, dst = random.sample(range(BLOCKS), count), random.sample(range(BLOCKS), count)
    lane = fetch(case, src, dst).lane
    assert case.agent.checksums(dst) == case.call("checksums", src)
    return lane


def test_both_directions_at_once() -> None:
    with linked("nccl") as (case, _):
        fetch(case, [1], [1])
        blocks = random.sample(range(BLOCKS), 200)
        ours, theirs = blocks[:100], blocks[100:]
        there = threading.Thread(target=case.call, args=("fetch", (case.agent.ref, ours, theirs)))
        there.start()
        own = case.agent.fetch(case.peer.ref, theirs[:50], ours[50:], request_id="in", deadline_s=20)
        assert own.wait(25).lane.startswith("nccl/")
        there.join(30)
        assert case.agent.checksums(ours[50:]) == case.call("checksums", theirs[:50])


class _Over(Exception):
    """Closes a pair with a dead source."""


def test_a_peer_that_is_killed_in_the_middle_ends_the_transfer_in_an_error_at_once() -> None:
    with pytest.raises(_Over), linked("nccl", "tcp") as (case, source):
        fetch(case, [1], [1])
        os.kill(source, signal.SIGSTOP)  # So that it is in the middle for certain.
        blocks = list(range(BLOCKS))
        handle = case.agent.fetch(case.peer.ref, blocks, blocks, request_id="r", deadline_s=20)
        time.sleep(0.3)
        assert not handle.done()
        os.kill(source, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(TransferError):
            handle.wait(10)
        print(f"the error came {time.monotonic() - began:.2f} s after the kill")
        assert time.monotonic() - began < 5
        torch.zeros(1, device=DEVICES[1]).add_(1).cpu()  # No kernel of NCCL is left to wait for.
        raise _Over


def test_a_peer_that_hangs_costs_the_deadline_and_then_the_pair_goes_on() -> None:
    with linked("nccl", "tcp") as (case, source):
        fetch(case, [1], [1])
        blocks, lanes = list(range(BLOCKS)), []
        for _ in range(2):
            os.kill(source, signal.SIGSTOP)
            began = time.monotonic()
            try:
                with pytest.raises(MigrateError) as caught:
                    case.agent.fetch(case.peer.ref, blocks, blocks, request_id="r", deadline_s=1.0).wait(15)
                print(f"{caught.type.__name__} after {time.monotonic() - began:.2f} s")
                assert isinstance(caught.value, DeadlineExceeded) and time.monotonic() - began < 4
            finally:
                os.kill(source, signal.SIGCONT)
            lanes.append(compared(case, 50))
        print(lanes)
        assert {lane.partition("/")[0] for lane in lanes} <= {"nccl", "tcp"}


def test_a_kernel_that_waits_for_its_peer_is_ended() -> None:
    with linked("nccl") as (case, _):
        fetch(case, [1], [1])
        backend = case.agent._assembly.backends[0]
        assert isinstance(backend, NcclBackend)
        (line,) = backend._lines.values()
        link = line.link
        assert link is not None
        flight = link._wire.receive(torch.zeros(1 << 20, dtype=torch.uint8, device=DEVICES[1]))
        time.sleep(0.2)
        assert not flight.done()
        began = time.monotonic()
        assert link.close()
        print(f"aborted within {time.monotonic() - began:.3f} s")
        torch.cuda.synchronize(DEVICES[1])
        assert compared(case, 50).startswith("nccl/")


def test_memory_of_a_link() -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(DEVICES[1])[0]
    with linked("nccl") as (case, _):
        fetch(case, [1], [1])
        torch.cuda.synchronize(DEVICES[1])
        used = free - torch.cuda.mem_get_info(DEVICES[1])[0] - BLOCKS * LARGE.block_bytes - (512 << 20)
        print(f"{used / 2**20:.0f} MiB for a communicator")
        assert used < 2 << 30


def test_without_nixl_and_memory_that_can_be_mapped_nccl_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.transfer.assemble.nixl_is_available", lambda: (False, "it cannot be imported"))
    with linked("mapped", "nixl", "local", "nccl", "tcp") as (case, _):
        assert compared(case, 100) == "nccl/send-recv"
