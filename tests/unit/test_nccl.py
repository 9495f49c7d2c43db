# SPDX-License-Identifier: Apache-2.0
"""The NCCL lane without NCCL: selection, refusal, order of messages, ends of links.

Communicators are those of ``tests/fake_wire.py``; everything else is the product's. On GPUs: ``tests/cuda``.
"""

from __future__ import annotations

import logging
import random
import socket
import threading
import time
import uuid
from collections.abc import Iterator

import msgspec
import pytest
import torch
from torch import distributed

from components.errors import ConfigError, DeadlineExceeded, TransferCancelled, TransferError
from components.transfer import AgentConfig, KVPool, TransferAgent, TransferHandle
from components.transfer.control.record import AgentRecord
from components.transfer.data import nccl_wire
from components.transfer.data.nccl import NcclBackend
from components.transfer.data.nccl_line import Card
from components.transfer.data.nccl_wire import _IdStore, nccl_is_available
from components.transfer.regions import regions_of
from tests.fake_wire import Cable

BLOCKS = 48
SLOT_BLOCKS = 5
BLOCK_BYTES = 3 * 2 * 8 * 4 * 2


def pools(seed: int) -> list[KVPool]:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn((BLOCKS, 2, 8, 4), generator=generator).bfloat16() for _ in range(3)]
    return [KVPool(f"layer.{i}", t, BLOCKS, 0) for i, t in enumerate(tensors)]


class Two:
    """Two agents, each with an NCCL lane put in front of plain TCP."""

    def __init__(self, cable: Cable, cards: tuple[Card, Card] = (Card("a", "2.28"), Card("b", "2.28"))) -> None:
        namespace = uuid.uuid4().hex
        self.src, self.dst = (TransferAgent(self._config(name, namespace)) for name in ("src", "dst"))
        self.parts = (pools(1), pools(2))
        for agent, parts, card in zip((self.src, self.dst), self.parts, cards, strict=True):
            agent.start(parts)
            self._add(agent, parts, card, cable)
        for agent, peer in ((self.dst, self.src), (self.src, self.dst)):
            agent.directory.put(peer.record)

    def _config(self, name: str, namespace: str) -> AgentConfig:
        return AgentConfig(name=name, namespace=namespace, block_size=8, layers=3, backends=("tcp",))

    def _add(self, agent: TransferAgent, parts: list[KVPool], card: Card, cable: Cable) -> None:
        regions = regions_of(parts)
        limit = 4 * SLOT_BLOCKS * BLOCK_BYTES
        backend = NcclBackend(agent.record.name, agent.epoch, regions, "127.0.0.1", limit, card, cable.connect)
        whole = agent._assembly
        whole.backends.insert(0, backend)
        record = msgspec.structs.replace(
            agent.record, nccl_address=backend.address, gpu=card.gpu, nccl_version=card.version
        )
        object.__setattr__(whole, "record", record)

    def nccl(self, agent: TransferAgent) -> NcclBackend:
        backend = agent._assembly.backends[0]
        assert isinstance(backend, NcclBackend)
        return backend

    def fetch(self, src: list[int], dst: list[int], deadline_s: float = 10.0) -> str:
        handle = self.dst.fetch(self.src.ref, src, dst, request_id="r", deadline_s=deadline_s)
        return handle.wait(deadline_s + 5).lane

    def close(self) -> None:
        self.src.close()
        self.dst.close()


@pytest.fixture
def cable() -> Cable:
    return Cable()


@pytest.fixture
def two(cable: Cable) -> Iterator[Two]:
    pair = Two(cable)
    yield pair
    pair.close()


def shuffled(count: int) -> list[int]:
    return random.sample(range(BLOCKS), count)


@pytest.mark.parametrize("count", [1, SLOT_BLOCKS, 2 * SLOT_BLOCKS + 1, BLOCKS])
def test_blocks_arrive_both_ways_and_no_others_change(two: Two, count: int) -> None:
    for near, far in ((two.src, two.dst), (two.dst, two.src)):
        src, dst = shuffled(count), shuffled(count)
        others = sorted(set(range(BLOCKS)) - set(dst))
        before = near.checksums(others)
        result = near.fetch(far.ref, src, dst, request_id="r", deadline_s=10).wait(15)
        assert result.lane == "nccl/send-recv" and result.bytes == count * BLOCK_BYTES
        assert near.checksums(dst) == far.checksums(src)
        assert near.checksums(others) == before


def test_agents_that_ask_each_other_for_everything_at_once_all_get_it(two: Two) -> None:
    handles = []
    for number in range(12):
        near, far = (two.src, two.dst) if number % 2 else (two.dst, two.src)
        blocks = shuffled(20)
        handles.append(near.fetch(far.ref, blocks, blocks, request_id=f"r{number}", deadline_s=20))
    assert {handle.wait(25).lane for handle in handles} == {"nccl/send-recv"}


@pytest.mark.parametrize(
    "cards, why",
    [
        ((Card("a", "2.28"), Card("a", "2.28")), "takes no GPU twice"),
        ((Card("a", "2.28"), Card("b", "2.27")), "version 2.28, this agent 2.27"),
    ],
)
def test_a_pair_that_nccl_cannot_serve_is_refused_with_the_reason(
    cable: Cable, cards: tuple[Card, Card], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    pair = Two(cable, cards)
    try:
        assert pair.fetch([1, 2], [3, 4]) == "tcp/sockets"
        assert why in caplog.text and not cable.wires
    finally:
        pair.close()


def test_where_no_communicator_can_be_made_the_same_transfer_goes_by_tcp(two: Two, cable: Cable) -> None:
    cable.broken = True
    assert two.fetch([1, 2], [3, 4]) == "tcp/sockets"
    assert two.dst.checksums([3, 4]) == two.src.checksums([1, 2])


def test_a_peer_that_stalls_costs_the_deadline_and_no_more_and_then_goes_by_tcp(two: Two, cable: Cable) -> None:
    assert two.fetch([1], [2]) == "nccl/send-recv"
    cable.stuck = True
    failed = 0
    while two.nccl(two.dst).reaches(two.src.record):
        began = time.monotonic()
        with pytest.raises((DeadlineExceeded, TransferError)):
            two.fetch(shuffled(20), shuffled(20), deadline_s=0.5)
        assert time.monotonic() - began < 5
        failed += 1
        assert failed < 10  # Two, but for those that had no time to begin on a busy machine.
    assert failed >= 2 and all(wire.aborted for wire in cable.wires)
    blocks = shuffled(20)
    assert two.fetch(blocks, blocks) == "tcp/sockets"
    assert two.dst.checksums(blocks) == two.src.checksums(blocks)


def under_way(two: Two, cable: Cable) -> TransferHandle:
    """A fetch of 20 blocks that stands still in the middle, over a link that has served one before."""
    two.fetch([1], [2])
    cable.stuck = True
    handle = two.dst.fetch(two.src.ref, shuffled(20), shuffled(20), request_id="r", deadline_s=30)
    time.sleep(0.1)
    return handle


def test_a_transfer_that_was_cancelled_ends_its_link_and_the_next_one_makes_another(two: Two, cable: Cable) -> None:
    handle = under_way(two, cable)
    handle.cancel()
    with pytest.raises(TransferCancelled):
        handle.wait(5)
    assert not handle.unsafe_blocks
    cable.stuck = False
    made = len(cable.wires)
    blocks = shuffled(20)
    assert two.fetch(blocks, blocks) == "nccl/send-recv"
    assert len(cable.wires) > made
    assert two.dst.checksums(blocks) == two.src.checksums(blocks)


def test_a_peer_that_dies_in_the_middle_is_noticed_before_the_deadline(two: Two, cable: Cable) -> None:
    handle = under_way(two, cable)
    two.nccl(two.src)._acceptor.close()  # What the kernel does to a killed process's sockets.
    began = time.monotonic()
    with pytest.raises(TransferError):
        handle.wait(10)
    assert time.monotonic() - began < 2


def test_a_set_up_that_hangs_leaves_transfers_to_the_next_lane(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()

    def hang(sock: socket.socket, rank: int, device: torch.device, end: float) -> nccl_wire.Wire:
        never.wait(20)
        raise TransferError("it hung")

    monkeypatch.setattr("components.transfer.data.nccl_line._MEANWHILE_S", 0.2)
    two.nccl(two.dst)._connect = hang
    blocks = shuffled(20)
    assert two.fetch(blocks, blocks) == "tcp/sockets"
    assert two.fetch(blocks, blocks) == "tcp/sockets"
    never.set()


def test_memory_that_an_abort_leaves_in_use_is_not_used_again(two: Two, cable: Cable) -> None:
    two.fetch([1], [2])
    cable.stuck = True
    for wire in cable.wires:
        wire.abort = lambda: False  # type: ignore[method-assign]
    with pytest.raises(DeadlineExceeded):
        two.fetch(shuffled(20), shuffled(20), deadline_s=0.3)
    assert not two.nccl(two.dst).reaches(two.src.record)
    assert two.fetch([1], [2]) == "tcp/sockets"


def test_the_id_reaches_rank_one_over_the_socket_of_the_pair() -> None:
    ends = socket.socketpair()
    until = time.monotonic() + 5
    stores = [_IdStore(end, until) for end in ends]
    # As torch's C++ does it.
    distributed.PrefixStore("p", stores[0]).set("0", "id of a communicator")
    assert distributed.PrefixStore("p", stores[1]).get("0") == b"id of a communicator"
    for end in ends:
        end.close()


def test_without_nccl_the_reason_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl_wire.distributed, "is_nccl_available", lambda: False)
    available, why = nccl_is_available()
    assert not available and "built without NCCL" in why
    monkeypatch.setattr(nccl_wire.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    available, why = nccl_is_available()
    assert not available and "GPU" in why


def test_nccl_comes_before_tcp_and_after_all_others_and_is_not_there_for_host_memory() -> None:
    order = AgentConfig(name="a").backends
    assert order[-2:] == ("nccl", "tcp")
    lone = TransferAgent(AgentConfig(name="a", namespace=uuid.uuid4().hex, backends=("nccl", "tcp")))
    lone.start(pools(1))
    try:
        assert lone.lanes == ("tcp/sockets",) and not lone.record.nccl_address
    finally:
        lone.close()
    with pytest.raises(ConfigError, match="nccl"):
        AgentConfig(name="a", backends=("ncll",)).validate()


def test_a_record_of_an_agent_without_the_lane_reads_as_before(two: Two) -> None:
    plain: AgentRecord = msgspec.structs.replace(two.src.record, nccl_address="")
    assert not two.nccl(two.dst).reaches(plain)
