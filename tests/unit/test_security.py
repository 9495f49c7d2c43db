# SPDX-License-Identifier: Apache-2.0
"""Security: credentials of the control surface, memory that peers can name, names that become paths and keys."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import json
import re
import socket
import struct
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from components.credentials import VARIABLE
from components.engine.protocol import RequestId, Sampling
from components.errors import ConfigError, MigrateError, Unauthorized
from components.handshake import connect
from components.messages import pack, unpack
from components.migration.messages import WorkerCall, WorkerOp, WorkerReply
from components.serve import reach
from components.serve.graph import load
from components.serve.plan import make_plan, parse_overrides, read_yaml
from components.transfer import AgentConfig, KVPool, TransferAgent, Transport, move_to_shared_memory
from components.transfer.calibration import Calibration
from components.transfer.control import record
from components.transfer.control.directory import Directory
from components.transfer.control.endpoint import without_secrets
from components.transfer.control.etcd import EtcdStore
from components.transfer.data import handover
from components.transfer.data.nccl import NcclBackend
from components.transfer.data.nccl_line import Card
from components.transfer.regions import regions_of
from components.transfer.session import messages as session
from components.transfer.session.backend import NixlBackend
from components.transfer.session.side import Inbox, Side
from tests.fake_wire import Cable
from tests.fuzz.samples import agent_record
from tests.streams import Cluster
from tests.unit.test_poison import example

ROOT = Path(__file__).parents[2]
SECRET = "c0ffee" * 8


@pytest.fixture
def secret(tmp_path: Path, use_secret: Callable[[Path | None], None]) -> Path:
    """A configured secret."""
    path = tmp_path / "secret"
    path.write_text(SECRET + "\n")
    use_secret(path)
    return path


STATUS = WorkerCall(WorkerOp.STATUS)


def test_with_a_secret_only_sealed_messages_are_read(secret: Path, use_secret: Callable[[Path | None], None]) -> None:
    sealed = pack(STATUS)
    assert unpack(sealed, WorkerCall) == STATUS
    for wrong in (
        {"m": sealed["m"]},
        {"m": sealed["m"], "s": ""},
        {"m": sealed["m"], "s": "é"},
        {"m": sealed["m"], "s": 5},
        {"m": sealed["m"], "s": sealed["s"][:-1] + "0" if sealed["s"][-1] != "0" else "1"},
        {"m": pack(WorkerCall(WorkerOp.DRAIN))["m"], "s": sealed["s"]},
    ):
        with pytest.raises(Unauthorized):
            unpack(wrong, WorkerCall)
    # The seal is one of a call, not of whatever else the bytes may be read as.
    with pytest.raises(Unauthorized):
        unpack(sealed, WorkerReply)
    use_secret(None)
    assert "s" not in pack(STATUS)


@pytest.mark.parametrize(("content", "what"), [(None, "No such file"), (b"short\n", "at least 16 bytes")])
def test_a_secret_that_cannot_be_used_is_an_error_with_the_fix(
    tmp_path: Path, use_secret: Callable[[Path | None], None], content: bytes | None, what: str
) -> None:
    path = tmp_path / f"secret-{what[:2]}"
    if content is not None:
        path.write_bytes(content)
    use_secret(path)
    with pytest.raises(ConfigError, match=what):
        pack(STATUS)


async def test_workers_serve_with_a_secret_and_show_neither_that_nor_a_whole_epoch(secret: Path) -> None:
    cluster = Cluster(uuid.uuid4().hex, 1)
    await cluster.start(2, step_s=0.005)
    try:
        asking = asyncio.ensure_future(cluster.complete((1, 2, 3), Sampling(max_tokens=60)))
        moved = None
        while (moved is None or not moved.ok) and not asking.done():
            await asyncio.sleep(0.02)
            moved = await cluster.move()
        assert moved is not None and moved.ok
        assert len(await asking) == 60
        node = cluster.nodes[0]
        unsealed = {"m": pack(WorkerCall(WorkerOp.DRAIN))["m"]}
        [denied] = [unpack(item, WorkerReply) async for item in node.control.serve(unsealed)]
        assert denied.error is not None and denied.error[0] == Unauthorized.code and not node.status.cordoned
        [reply] = [unpack(item, WorkerReply) async for item in node.control.serve(pack(STATUS))]
        shown, epoch = msgspec.json.encode(reply).decode(), str(node.engine._live.agent.ref.epoch)
        assert SECRET not in shown and epoch[:8] in shown and epoch not in shown
    finally:
        await cluster.stop()


# Memory


class Lanes:
    """An agent of eight blocks with every socket that it can have, and what a stranger may know of it."""

    def __init__(self) -> None:
        self.kv = torch.arange(8 * 64, dtype=torch.float32).reshape(8, 64)
        pool = KVPool("layer.0", self.kv, 8, 0)
        move_to_shared_memory([pool])
        self.before = self.kv.clone()
        self.agent = TransferAgent(AgentConfig(name="decode-0", backends=("mapped", "tcp")))
        self.agent.start([pool])
        self.epoch = str(self.agent.epoch)
        self.nccl = NcclBackend(
            "decode-0", self.epoch, regions_of([pool]), "127.0.0.1", 4096, Card("a", "2"), Cable().connect
        )
        self.addresses = {
            "kv-tcp": self.agent.record.tcp_address,
            "kv-nccl": self.nccl.address,
            "kv-shm": handover._name(self.epoch),
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
        self.nccl.close()
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


@pytest.mark.parametrize("lane", ["kv-tcp", "kv-nccl", "kv-shm"])
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
    assert handover._name(lanes.epoch)[1:] in names
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
    for near, _, size in moved:
        assert any(start <= near and near + size <= start + length for start, length in pools)


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
    exchange = NixlBackend(config, Side("mine", "mine", link, regions, None, "host"), directory, Calibration())  # type: ignore[arg-type]
    number, inbox = exchange._open(peer)
    said = (session.Landed, session.Freed)

    def say(sender: str, message: session.Message) -> None:
        link.inbox = {sender: [session.encode(message, sender, "mine/mine")]}
        assert exchange.progress() == []

    for kind in said:
        say(other, kind(number, 0))
        say(peer.key, kind(number + 1, 0))
    say(other, session.Ended(number))
    say(peer.key, session.Ask(number, "r", blocks(1), blocks(1), (), 0, 1000))
    assert inbox == Inbox()
    for kind in said:
        say(peer.key, kind(number, 0))
    assert inbox == Inbox(landed={0}, freed={0})
    assert exchange.inboxes == {(peer.key, number): inbox}


def moved_for(
    message: session.Message, sealed: Callable[[bytes, str], bytes] | None = None
) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Memory that a session of eight blocks moves for a message, and its pools."""
    peer, link, directory = agent_record(), Link(), Directory()
    directory.put(peer)
    tensors = [torch.zeros((8, 4, 2)) for _ in range(2)]
    regions = regions_of([KVPool(f"layer.{n}", t, 8, 0) for n, t in enumerate(tensors)])
    config = AgentConfig(name="mine", block_size=4)
    exchange = NixlBackend(config, Side("mine", "mine", link, regions, None, "host"), directory, Calibration())  # type: ignore[arg-type]
    data = session.encode(message, peer.key, "mine/mine")
    link.inbox = {peer.key: [data if sealed is None else sealed(data[32:], peer.key)]}
    for service in exchange.progress():
        for _ in service:
            pass
    assert not exchange.inboxes
    return link.moved, [(t.data_ptr(), t.numel() * t.element_size()) for t in tensors]


# Names

NAMES = ["../../etc/passwd", "/etc/passwd", "a/b", "", "\x00", "x" * 10_000, "a b", "*", ">", "dynamo/agents/../x"]


@pytest.mark.parametrize("name", NAMES)
def test_a_namespace_cannot_leave_its_place_in_etcd_and_nats(name: str) -> None:
    with pytest.raises(ConfigError, match="namespace"):
        AgentConfig(name="agent", namespace=name).validate()


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b", "", "x" * 1000])
def test_an_agent_cannot_leave_its_key(name: str) -> None:
    with pytest.raises(ConfigError, match="agent name"):
        AgentConfig(name=name).validate()


@pytest.mark.parametrize("name", NAMES)
async def test_a_request_id_is_only_a_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cluster = Cluster(uuid.uuid4().hex, 1)
    await cluster.start(1)
    try:
        for op in (WorkerOp.LANDING, WorkerOp.ABORT, WorkerOp.MIGRATE):
            call = pack(WorkerCall(op, RequestId(name)))
            assert len([item async for item in cluster.nodes[0].control.serve(call)]) == 1
    finally:
        await cluster.stop()
    assert list(tmp_path.rglob("*")) == []


def test_a_record_is_only_that_of_the_agent_whose_key_it_is_under() -> None:
    found = example()
    store = EtcdStore(AgentConfig(name="x", etcd_endpoints=("http://127.0.0.1:1",)))
    directory = Directory()
    for key in (b"somebody else", b"\xff\xfe", b""):
        store._learn(directory, store._prefix.encode() + key, record.encode(found))
    assert directory.names() == []
    store._learn(directory, store._prefix.encode() + found.name.encode(), record.encode(found))
    assert directory.names() == [found.name]
    with pytest.raises(MigrateError, match="is published as"):
        record.published(record.encode(found), "other")


# What is shown, and where it can be reached


def planned(environment: dict[str, str], *overrides: str) -> Any:
    values = read_yaml(ROOT / "configs" / "disagg.yaml")
    entry = load("graphs.disagg:Frontend")
    return make_plan(entry, values, parse_overrides(list(overrides)), Transport.AUTO, environment)


def test_the_dry_run_shows_no_token_and_no_password() -> None:
    given = "{hf_token: t0ps3cret, api-key: t0ps3cret, password: t0ps3cret, max_num_batched_tokens: 77, "
    given += "hf_overrides: {my-token: t0ps3cret}}"
    plan = planned({"ETCD_AUTH_PASSWORD": "t0ps3cret"}, f"--DecodeWorker.engine-args={given}")
    shown = plan.shown()
    assert "t0ps3cret" not in shown
    assert "--max-num-batched-tokens=77" in shown
    # The workers themselves get it.
    assert any("t0ps3cret" in json.dumps(process.command) for process in plan.processes)


def test_what_vllm_writes_of_a_step_when_it_crashes_has_no_tokens() -> None:
    dump = pytest.importorskip("vllm.logging_utils.dump_input")
    from components.engine.vllm.records import Install, Job, StepMetadata

    install = Install("r-1", [70101, 70102], [70103], {"seed": 70104}, None, b"70105")
    job = Job(1, RequestId("r"), "r-1", (), (4,), (5,), (), (), 1.0)
    for shown in (dump.prepare_object_to_dump(StepMetadata([install], [job])), repr(install)):
        assert "701" not in shown and "Install(r-1, 2 + 1 tokens)" in shown


def test_an_address_is_told_without_its_password() -> None:
    assert without_secrets("nats://user:t0ps3cret@host:4222") == "nats://host:4222"


def test_a_graph_on_one_machine_listens_on_loopback_unless_told_otherwise() -> None:
    inside = planned({}).processes[0].environment
    assert inside["DYN_TCP_RPC_HOST"] == inside["DYN_SYSTEM_HOST"] == "127.0.0.1"
    assert inside["DYN_TCP_RESPONSE_STREAM_HOST"] == "lo"
    assert planned({"DYN_SYSTEM_HOST": "0.0.0.0"}).processes[0].environment.get("DYN_SYSTEM_HOST") is None
    for elsewhere in ({"ETCD_ENDPOINTS": "http://10.0.0.1:2379"}, {"DYN_MIGRATE_METRICS_HOST": "graph"}):
        assert "DYN_TCP_RPC_HOST" not in planned(elsewhere).processes[0].environment
    assert reach.stays_here({"ETCD_ENDPOINTS": "http://127.0.0.1:1,http://[::1]:2,localhost:3"})
    assert not reach.stays_here({}, "10.0.0.7")
    values = planned({})
    assert values.host == "127.0.0.1"


def test_nothing_on_the_wire_or_on_disk_is_a_pickle() -> None:
    forbidden = re.compile(r"\bpickle\b|torch\.load\(|yaml\.load\(|\beval\(|\bexec\(|\bmarshal\b|import shelve")
    for folder in ("components", "planner_hooks", "graphs"):
        for path in (ROOT / folder).rglob("*.py"):
            found = forbidden.search(path.read_text())
            assert found is None, f"{path}: {found}"


def test_the_envelope_is_all_that_is_decoded() -> None:
    for payload_ in (None, [], "m", {"m": 5}, {"m": "%%%"}, {"m": base64.b64encode(b"\xc1").decode()}, {}):
        with pytest.raises(MigrateError):
            unpack(payload_, WorkerCall)
