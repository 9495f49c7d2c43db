# SPDX-License-Identifier: Apache-2.0
"""The lane of mapped memory: bytes, access, and the end of a side."""

from __future__ import annotations

import os
import re
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from components.errors import TransferCancelled, TransferError
from components.transfer import AgentConfig, KVPool, SharedZeros, TransferAgent
from components.transfer.data import hostcopy
from components.transfer.data.handover import Giver, map_peer, name_of
from components.transfer.data.shared import shared_storages

BLOCKS, WIDTH = 32, 4096


def pools(seed: int) -> list[KVPool]:
    """Two pools as views of one storage, as an engine may have them."""
    whole = torch.randint(0, 255, (2, BLOCKS, WIDTH), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return [KVPool(f"layer.{i}", whole[i], BLOCKS, 0) for i in range(2)]


def agent(name: str, namespace: str, parts: list[KVPool], **more: object) -> TransferAgent:
    settings = {"backends": ("mapped", "tcp")} | more
    made = TransferAgent(AgentConfig(name=name, namespace=namespace, **settings))  # type: ignore[arg-type]
    made.start(parts)
    return made


@pytest.fixture
def two() -> Iterator[tuple[TransferAgent, list[KVPool], TransferAgent, list[KVPool]]]:
    namespace = uuid.uuid4().hex
    here, there = pools(1), pools(2)
    for pool in (*here, *there):
        pool.tensor.share_memory_()
    src, dst = agent("src", namespace, here), agent("dst", namespace, there)
    yield src, here, dst, there
    src.close()
    dst.close()


def test_all_views_follow_when_a_pool_moves_and_nothing_is_left_in_dev_shm() -> None:
    before = set(os.listdir("/dev/shm"))
    parts = pools(1)
    view, copy = parts[1].tensor[3], parts[1].tensor[3].clone()
    old = parts[1].tensor.data_ptr()
    for part in parts:
        part.tensor.share_memory_()
    assert parts[1].tensor.data_ptr() != old
    assert torch.equal(view, copy)
    view[0] += 1
    assert parts[1].tensor[3, 0] == view[0] != copy[0]
    assert len(shared_storages(parts)) == 1
    assert set(os.listdir("/dev/shm")) <= before


def test_zeros_of_an_engine_are_made_in_shared_memory_without_a_name() -> None:
    before = set(os.listdir("/dev/shm"))
    with SharedZeros():
        made = torch.zeros(1 << 20, 2, dtype=torch.int16)
        small, elsewhere = torch.zeros(16), torch.zeros(1 << 20, device="meta")
    assert (made.shape, made.dtype, made.is_contiguous()) == ((1 << 20, 2), torch.int16, True)
    assert made.is_shared() and not bool(made.any())
    assert not small.is_shared() and elsewhere.device.type == "meta"
    assert not torch.zeros(1 << 20).is_shared()
    assert [s.size for s in shared_storages([KVPool("p", part, 512, 0) for part in made.view(2, 512, -1)])] == [4 << 20]
    assert set(os.listdir("/dev/shm")) <= before


def test_zeros_are_made_all_the_same_where_no_memory_can_be_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> int:
        raise OSError("not permitted")

    monkeypatch.setattr(os, "memfd_create", refused)
    with SharedZeros():
        made = torch.zeros(1 << 20)
    assert not made.is_shared() and not bool(made.any())


@pytest.mark.parametrize("setting", [{"transport": "tcp"}, {"strategy": "read"}, {"backends": ("nixl", "tcp")}])
def test_a_way_asked_for_by_name_is_not_replaced(setting: dict[str, object]) -> None:
    parts = pools(1)
    for part in parts:
        part.tensor.share_memory_()
    lone = agent("lone", uuid.uuid4().hex, parts, **msgspec.convert(setting, dict))
    assert "shm/mapped" not in lone.lanes and lone.record.scope == ""
    lone.close()


def test_fetch_names_the_lane_and_moves_the_named_blocks(two: tuple) -> None:  # type: ignore[type-arg]
    src, here, dst, there = two
    done = dst.fetch(src.ref, [5, 6, 9], [1, 0, 31], request_id="r", deadline_s=10).wait(20)
    assert (done.lane, done.bytes) == ("shm/mapped", 3 * 2 * WIDTH)
    assert all(torch.equal(t.tensor[[1, 0, 31]], h.tensor[[5, 6, 9]]) for h, t in zip(here, there, strict=True))


def test_a_peer_that_closed_is_unmapped(two: tuple) -> None:  # type: ignore[type-arg]
    src, here, dst, _ = two
    dst.fetch(src.ref, [1], [1], request_id="r", deadline_s=10).wait(20)
    [inode] = {os.fstat(storage.fd).st_ino for storage in shared_storages(here)}

    def times_mapped() -> int:
        return len(re.findall(rf" {inode} +/dev/shm", Path("/proc/self/maps").read_text()))

    # The owner's own mapping, and the peer's.
    assert times_mapped() == 2
    src.close()
    wake = threading.Event()
    for _ in range(200):
        if times_mapped() < 2:
            break
        wake.wait(0.05)
    assert times_mapped() == 1


def test_memory_outside_of_what_is_shared_is_refused(two: tuple) -> None:  # type: ignore[type-arg]
    src, _, dst, there = two
    record = src.record
    region = record.regions[0]
    address, stride, length = region.segments[0]
    for segment in ((address - 1, stride, length), (address, stride * 3, length), (address, -stride, length)):
        liar = msgspec.structs.replace(
            record, regions=(msgspec.structs.replace(region, segments=(segment,)), record.regions[1])
        )
        dst.directory.put(liar)
        before = there[0].tensor.clone()
        with pytest.raises(TransferError, match="outside"):
            dst.fetch(src.ref, [0, 31], [0, 31], request_id="r", deadline_s=10).wait(20)
        assert torch.equal(there[0].tensor, before)


def test_a_peer_that_does_not_hand_over_is_served_by_the_next_lane(two: tuple) -> None:  # type: ignore[type-arg]
    src, here, dst, there = two
    fresh = agent("fresh", uuid.uuid4().hex, there)
    src.assembly.backends[0].close()
    fresh.directory.put(src.record)
    src.directory.put(fresh.record)
    done = fresh.fetch(src.ref, [4], [8], request_id="r", deadline_s=20).wait(30)
    assert done.lane != "shm/mapped" and torch.equal(there[0].tensor[8], here[0].tensor[4])
    fresh.close()


def test_only_the_right_epoch_and_user_get_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = pools(1)
    for part in parts:
        part.tensor.share_memory_()
    epoch = uuid.uuid4().hex
    giver = Giver(epoch, shared_storages(parts))
    with pytest.raises(TransferError, match="mapped"):
        map_peer("src", "another", 1e12)
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(TransferError, match="user"):
        map_peer("src", epoch, 1e12)
    monkeypatch.undo()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
        stranger.connect(name_of(epoch))
        stranger.sendall(b"\xff" * 64)
        # A version and a number, and no descriptor.
        assert len(socket.recv_fds(stranger, 1000, 1)[0]) == 40 and socket.recv_fds(stranger, 1000, 1)[:2] == (b"", [])
    mapping = map_peer("src", epoch, 1e12)
    giver.close()
    assert not mapping.alive()
    mapping.close()


def test_a_cancelled_transfer_stands_still(two: tuple, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[type-arg]
    src, _, dst, there = two
    dst.fetch(src.ref, [1], [1], request_id="r", deadline_s=10).wait(20)
    backend = dst.assembly.backends[0]
    begun, go = threading.Event(), threading.Event()
    submit: Callable[..., Future[None]] = backend._copier.submit  # type: ignore[attr-defined]

    def slow(*columns: np.ndarray, around: bool) -> Future[None]:
        begun.set()
        go.wait(10)
        return submit(*columns, around=around)

    monkeypatch.setattr(backend._copier, "submit", slow)  # type: ignore[attr-defined]
    handle = dst.fetch(src.ref, [2], [2], request_id="r", deadline_s=10)
    begun.wait(10)
    handle.cancel()
    go.set()
    with pytest.raises(TransferCancelled):
        handle.wait(20)
    assert dst.unsafe_blocks() == frozenset()


def test_without_numba_other_lanes_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.transfer.assemble.copier_is_available", lambda: (False, "no numba"))
    parts = pools(1)
    for part in parts:
        part.tensor.share_memory_()
    lone = agent("lone", uuid.uuid4().hex, parts)
    assert "shm/mapped" not in lone.lanes
    lone.close()


def test_threads_are_bounded_by_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert (hostcopy.threads_for(0), hostcopy.threads_for(3)) == (8, 3)
