# SPDX-License-Identifier: Apache-2.0
"""Who may do what: credentials of the control surface, memory that peers can name, names that become paths and keys."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Generator
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from components.engine.protocol import EngineInfo, RequestId
from components.errors import ConfigError, MigrateError, Unauthorized
from components.messages import RouterCall, RouterOp, RouterReply, WorkerCall, WorkerOp, WorkerReply, pack, unpack
from components.serve import reach
from components.serve.graph import load
from components.serve.plan import make_plan, parse_overrides, read_yaml
from components.transfer import AgentConfig, KVPool, Transport
from components.transfer.calibration import Calibration
from components.transfer.control import record
from components.transfer.control.directory import Directory
from components.transfer.control.endpoint import without_secrets
from components.transfer.control.etcd import EtcdStore
from components.transfer.parking.ticket import Ticket, require_id
from components.transfer.regions import regions_of
from components.transfer.session import messages as session
from components.transfer.session.exchange import Exchange
from components.worker.service import WorkerService
from tests.faults import clock
from tests.faults.cluster import Cluster, expected, payload, quiet
from tests.faults.network import Weather
from tests.fuzz.samples import agent_record
from tests.paged import new_engine
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


STATUS = RouterCall(RouterOp.STATUS)


def test_with_a_secret_only_sealed_messages_are_read(secret: Path, use_secret: Callable[[Path | None], None]) -> None:
    sealed = pack(STATUS)
    assert unpack(sealed, RouterCall) == STATUS
    for wrong in (
        {"m": sealed["m"]},
        {"m": sealed["m"], "s": ""},
        {"m": sealed["m"], "s": "é"},
        {"m": sealed["m"], "s": 5},
        {"m": sealed["m"], "s": sealed["s"][:-1] + "0" if sealed["s"][-1] != "0" else "1"},
        {"m": pack(RouterCall(RouterOp.DRAIN, worker="1"))["m"], "s": sealed["s"]},
    ):
        with pytest.raises(Unauthorized):
            unpack(wrong, RouterCall)
    # The seal is one of a call, not of whatever else the bytes may be read as.
    with pytest.raises(Unauthorized):
        unpack(sealed, WorkerCall)
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


async def test_a_worker_does_nothing_for_who_has_no_secret(secret: Path) -> None:
    engine = new_engine("secret", "worker")
    info: EngineInfo = await engine.start()
    service = WorkerService(engine, info)
    unsealed = {"m": pack(WorkerCall(WorkerOp.INFO))["m"]}
    try:
        [answer] = [unpack(item, WorkerReply) async for item in service.control(unsealed)]
        assert answer.error is not None and answer.error[0] == Unauthorized.code
        assert answer.info is None
        [answer] = [unpack(item, WorkerReply) async for item in service.control(pack(WorkerCall(WorkerOp.INFO)))]
        assert answer.info == info
    finally:
        await engine.stop()


def test_a_whole_system_works_with_a_secret_and_never_shows_it(secret: Path) -> None:
    body = payload([1, 2, 3], 40, None)

    async def play() -> tuple[list[int], list[str], str]:
        cluster = Cluster(Random(1), Weather(), prefill=1, decode=2)
        await cluster.start()
        asking = cluster.job(cluster.ask("r", body))
        unsealed = {"m": pack(RouterCall(RouterOp.DRAIN, worker="0"))["m"]}
        denied = [unpack(item, RouterReply) async for item in cluster.router.control(unsealed)]
        status = [unpack(item, RouterReply) async for item in cluster.router.control(pack(STATUS))]
        answer = await asking
        await cluster.stop()
        codes = [reply.error[0] for reply in denied if reply.error is not None]
        return answer.tokens, codes, msgspec.json.encode(status).decode()

    with quiet():
        tokens, codes, shown = clock.run(play())
    assert tokens == expected(body)
    assert codes == [Unauthorized.code]
    assert SECRET not in shown


# Memory


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
        self.told.append(session.decode(data))

    def move(self, operation: str, peer: Any, memory: Any, *_: Any) -> Generator[bool, None, None]:
        self.moved += memory.tolist()
        yield True


def blocks(*numbers: int) -> bytes:
    return session.pack(np.array(numbers, np.int64))


HOSTILE = {
    "a source block beyond the pool": session.Ask(1, "mine", "r", blocks(8), blocks(1), (), 0, 1000),
    "a source block near 2**32": session.Ask(1, "mine", "r", blocks(2**32 - 1), blocks(1), (), 0, 1000),
    "another life": session.Ask(1, "theirs", "r", blocks(1), blocks(1), (), 0, 1000),
    "lists of different length": session.Ask(1, "mine", "r", blocks(1, 2), blocks(1), (), 0, 1000),
    "parts that the pair does not have": session.Ask(1, "mine", "r", blocks(1), blocks(1), (), 0, 1000, 3),
    "a list that is cut off": session.Ask(1, "mine", "r", b"\1\0\0", blocks(1), (), 0, 1000),
}


@pytest.mark.parametrize("what", list(HOSTILE))
def test_a_peer_cannot_have_memory_moved_that_is_not_in_a_registered_pool(what: str) -> None:
    assert moved_for(HOSTILE[what])[0] == []


def test_a_peer_that_asks_for_blocks_of_the_pool_gets_them() -> None:
    moved, pools = moved_for(session.Ask(1, "mine", "r", blocks(1, 7), blocks(1, 2), (), 0, 1000))
    assert moved
    for near, _, size in moved:
        assert any(start <= near and near + size <= start + length for start, length in pools)


def moved_for(message: session.Message) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Memory that a session of eight blocks moves for a message, and its pools."""
    peer, link, directory = agent_record(), Link(), Directory()
    directory.put(peer)
    tensors = [torch.zeros((8, 4, 2)) for _ in range(2)]
    regions = regions_of([KVPool(f"layer.{n}", t, 8, 0, token_dim=1) for n, t in enumerate(tensors)])
    config = AgentConfig(name="mine", block_size=4)
    exchange = Exchange(config, "mine", link, regions, None, directory, "host", Calibration())  # type: ignore[arg-type]
    link.inbox = {peer.key: [session.encode(message)]}
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


@pytest.mark.parametrize("name", [*NAMES, "A" * 32, "0" * 31])
def test_a_parked_file_is_named_by_nothing_but_its_own_id(name: str) -> None:
    ticket = msgspec.msgpack.decode((ROOT / "tests/fuzz/corpus/ticket/valid-00").read_bytes(), type=Ticket)
    with pytest.raises(ConfigError, match="ticket id"):
        require_id(msgspec.structs.replace(ticket, id=name))


@pytest.mark.parametrize("name", NAMES)
async def test_a_request_id_is_only_a_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    engine = new_engine("names", "worker")
    info = await engine.start()
    service = WorkerService(engine, info)
    try:
        for op in (WorkerOp.OFFER, WorkerOp.FREEZE, WorkerOp.ABORT, WorkerOp.RELEASE):
            call = pack(WorkerCall(op, RequestId(name)))
            assert len([item async for item in service.control(call)]) == 1
    finally:
        await engine.stop()
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
    given = "{hf_token: t0ps3cret, api-key: t0ps3cret, password: t0ps3cret, max_num_batched_tokens: 77}"
    plan = planned({"ETCD_AUTH_PASSWORD": "t0ps3cret"}, f"--DecodeWorker.engine-args={given}")
    shown = plan.shown()
    assert "t0ps3cret" not in shown
    assert '\\"max_num_batched_tokens\\": 77' in shown
    # The workers themselves get it.
    assert any("t0ps3cret" in json.dumps(process.environment) for process in plan.processes)


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
            unpack(payload_, RouterCall)
