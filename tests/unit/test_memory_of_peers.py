# SPDX-License-Identifier: Apache-2.0
"""Memory that peers can name: nobody without the secret reads or writes a block, and nothing outside a pool moves."""

from __future__ import annotations

import contextlib
import hmac
import socket
import struct
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from components.credentials import VARIABLE
from components.handshake import connect
from components.transfer import AgentConfig, KVPool, TransferAgent
from components.transfer.control.directory import Directory
from components.transfer.data import handover
from components.transfer.regions import regions_of
from components.transfer.session import messages as session
from components.transfer.session.backend import NixlBackend
from components.transfer.session.side import Inbox, Side
from components.transfer.shares import Shares
from tests.fuzz.samples import agent_record


class Lanes:
    """An agent of eight blocks with every socket that it can have, and what a stranger may know of it."""

    def __init__(self) -> None:
        self.kv = torch.arange(8 * 64, dtype=torch.float32).reshape(8, 64)
        pool = KVPool("layer.0", self.kv, 8, 0)
        self.kv.share_memory_()
        self.before = self.kv.clone()
        self.agent = TransferAgent(AgentConfig(name="decode-0", backends=("mapped", "tcp")))
        self.agent.start([pool])
        self.epoch = str(self.agent.epoch)
        self.addresses = {
            "kv-tcp": self.agent.record.tcp_address,
            "kv-shm": handover.name_of(self.epoch),
        }

    def stranger(self, lane: str) -> socket.socket:
        host, _, port = self.addresses[lane].rpartition(":")
        if lane == "kv-shm":
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.connect(self.addresses[lane])
        else:
            sock = socket.create_connection((host, int(port)))
        sock.settimeout(30)
        return sock

    def close(self) -> None:
        self.agent.close()


@pytest.fixture
def lanes(secret: Path) -> Iterator[Lanes]:
    made = Lanes()
    yield made
    made.close()


def everything(sock: socket.socket) -> tuple[int, int]:
    """Bytes and descriptors that come until the other side closes."""
    count, descriptors = 0, 0
    with contextlib.suppress(ConnectionResetError):
        while True:
            data, fds, _, _ = socket.recv_fds(sock, 1 << 16, 16)
            if not data:
                break
            count, descriptors = count + len(data), descriptors + len(fds)
    return count, descriptors


@pytest.mark.parametrize("lane", ["kv-tcp", "kv-shm"])
def test_whoever_knows_the_epoch_but_not_the_secret_reads_and_writes_no_block(lanes: Lanes, lane: str) -> None:
    ask = {"epoch": lanes.epoch, "push": True, "blocks": blocks(3), "unit": 0, "name": "x", "slot_blocks": 1}
    asked = msgspec.msgpack.encode(ask)
    for first in (b"", hmac.digest(b"", b"kv", "sha256") * 2):
        with lanes.stranger(lane) as sock:
            with contextlib.suppress(OSError):
                sock.sendall(first + struct.pack("!I", len(asked)) + asked + np.full(64, -1, "<f4").tobytes())
                sock.shutdown(socket.SHUT_WR)
            # The version of the handshake and a number: no row, no answer, no descriptor.
            assert everything(sock) == (40, 0)
    assert torch.equal(lanes.kv, lanes.before)


def test_a_peer_with_the_secret_reads_and_can_write_nothing(lanes: Lanes) -> None:
    end = time.monotonic() + 30
    for more in ({}, {"push": True}):
        with connect(lanes.addresses["kv-tcp"], f"kv-tcp {lanes.epoch}", end) as sock:
            asked = msgspec.msgpack.encode({"blocks": blocks(3)} | more)
            sock.sendall(struct.pack("!I", len(asked)) + asked + np.full(64, -1, "<f4").tobytes())
            got = b""
            with contextlib.suppress(ConnectionResetError):
                while part := sock.recv(4096):
                    got += part
        assert got.endswith(lanes.kv[3].numpy().tobytes()) if not more else got == b""
    assert torch.equal(lanes.kv, lanes.before)
    mapping = handover.map_peer("decode-0", lanes.epoch, end)
    address, size = mapping._pieces[0]
    [line] = [text for text in Path("/proc/self/maps").read_text().splitlines() if text.startswith(f"{address:x}-")]
    assert line.split()[1] == "r--s" and size >= 8 * 256
    mapping.close()


def test_an_agent_that_others_can_reach_says_that_it_has_no_secret(
    secret: Path, use_secret: Callable[[Path | None], None], caplog: pytest.LogCaptureFixture
) -> None:
    for path, host, said in ((None, "0.0.0.0", True), (None, "127.0.0.1", False), (secret, "0.0.0.0", False)):
        use_secret(path)
        caplog.clear()
        agent = TransferAgent(AgentConfig(name="lone", backends=("tcp",), advertise_host=host))
        agent.start([KVPool("layer.0", torch.zeros((8, 64)), 8, 0)])
        agent.close()
        assert (VARIABLE in caplog.text) == said


def test_no_user_of_the_host_can_read_an_epoch_from_the_names_of_sockets(lanes: Lanes) -> None:
    names = Path("/proc/net/unix").read_text()
    assert handover.name_of(lanes.epoch)[1:] in names
    assert lanes.epoch not in names


class Link:
    """Notes what a session wants to move, and what it tells the peer."""

    memory = "DRAM"

    def __init__(self) -> None:
        self.moved: list[list[int]] = []
        self.told: list[session.Message] = []
        self.inbox: dict[str, list[bytes]] = {}

    def poll(self) -> dict[str, list[bytes]]:
        found, self.inbox = self.inbox, {}
        return found

    def notify(self, peer: Any, data: bytes) -> None:
        self.told.append(session.decode(data, "mine/mine", peer.key))

    def move(self, operation: str, peer: Any, memory: Any, *_: Any) -> Generator[bool, None, None]:
        self.moved += memory.tolist()
        yield True


def blocks(*numbers: int) -> bytes:
    return session.pack(np.array(numbers, np.int64))


HOSTILE = {
    "a source block beyond the pool": session.Ask(1, "r", blocks(8), blocks(1), (), 0, 1000),
    "a source block near 2**32": session.Ask(1, "r", blocks(2**32 - 1), blocks(1), (), 0, 1000),
    "lists of different length": session.Ask(1, "r", blocks(1, 2), blocks(1), (), 0, 1000),
    "a list that is cut off": session.Ask(1, "r", b"\1\0\0", blocks(1), (), 0, 1000),
}


@pytest.mark.parametrize("what", list(HOSTILE))
def test_a_peer_cannot_have_memory_moved_that_is_not_in_a_registered_pool(what: str) -> None:
    assert moved_for(HOSTILE[what])[0] == []


def test_a_peer_that_asks_for_blocks_of_the_pool_gets_them() -> None:
    moved, pools = moved_for(session.Ask(1, "r", blocks(1, 7), blocks(1, 2), (), 0, 1000))
    assert moved
    for local, _, size in moved:
        assert any(start <= local and local + size <= start + length for start, length in pools)


SEALED: dict[str, Callable[[bytes, str], bytes]] = {
    "without a seal": lambda data, peer: data,
    "with a seal of nothing": lambda data, peer: bytes(32) + data,
    "from another peer": lambda data, peer: session.seal(data, "other/e", "mine/mine") + data,
    "for another life": lambda data, peer: session.seal(data, peer, "mine/before") + data,
}


@pytest.mark.parametrize("how", list(SEALED))
def test_a_message_that_a_peer_has_not_sealed_for_this_life_moves_nothing(secret: Path, how: str) -> None:
    ask = session.Ask(1, "r", blocks(1, 7), blocks(1, 2), (), 0, 1000)
    assert moved_for(ask)[0]
    assert moved_for(ask, SEALED[how])[0] == []


def test_only_the_peer_of_a_transfer_that_we_opened_says_what_has_landed(secret: Path) -> None:
    peer, other, link, directory = agent_record(), "other/e", Link(), Directory()
    directory.put(peer)
    config, regions = AgentConfig(name="mine"), regions_of([KVPool("layer.0", torch.zeros((8, 4)), 8, 0)])
    backend = NixlBackend(config, Side("mine", "mine", link, Shares(regions), None, "host"), directory)  # type: ignore[arg-type]
    number, inbox = backend._open(peer)
    said = (session.Landed, session.Freed)

    def say(sender: str, message: session.Message) -> None:
        link.inbox = {sender: [session.encode(message, sender, "mine/mine")]}
        assert backend.progress() == []

    for kind in said:
        say(other, kind(number, 0))
        say(peer.key, kind(number + 1, 0))
    say(other, session.Ended(number))
    say(peer.key, session.Ask(number, "r", blocks(1), blocks(1), (), 0, 1000))
    assert inbox == Inbox()
    for kind in said:
        say(peer.key, kind(number, 0))
    assert inbox == Inbox(landed={0}, freed={0})
    assert backend.inboxes == {(peer.key, number): inbox}


def moved_for(
    message: session.Message, sealed: Callable[[bytes, str], bytes] | None = None
) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Memory that a session of eight blocks moves for a message, and its pools."""
    peer, link, directory = agent_record(), Link(), Directory()
    directory.put(peer)
    tensors = [torch.zeros((8, 4, 2)) for _ in range(2)]
    regions = regions_of([KVPool(f"layer.{n}", t, 8, 0) for n, t in enumerate(tensors)])
    config = AgentConfig(name="mine", block_size=4)
    backend = NixlBackend(config, Side("mine", "mine", link, Shares(regions), None, "host"), directory)  # type: ignore[arg-type]
    data = session.encode(message, peer.key, "mine/mine")
    link.inbox = {peer.key: [data if sealed is None else sealed(data[32:], peer.key)]}
    for service in backend.progress():
        for _ in service:
            pass
    assert not backend.inboxes
    return link.moved, [(t.data_ptr(), t.numel() * t.element_size()) for t in tensors]
