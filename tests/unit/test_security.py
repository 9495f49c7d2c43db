# SPDX-License-Identifier: Apache-2.0
"""Security: credentials of the control surface, names that become paths and keys, what is shown to whom."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from components.engine.kv import RequestId
from components.engine.protocol import Sampling
from components.errors import ConfigError, MigrateError, Unauthorized
from components.messages import pack, unpack
from components.migration.messages import WorkerCall, WorkerOp, WorkerReply
from components.serve import reach
from components.serve.graph import load
from components.serve.plan import make_plan, parse_overrides, read_yaml
from components.transfer import AgentConfig, Transport
from components.transfer.control import record
from components.transfer.control.directory import Directory
from components.transfer.control.endpoint import without_secrets
from components.transfer.control.etcd import EtcdStore
from tests.streams import Cluster
from tests.unit.test_poison import example

ROOT = Path(__file__).parents[2]
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
        shown, epoch = msgspec.json.encode(reply).decode(), str(node.engine.parts.agent.ref.epoch)
        assert secret.read_text().strip() not in shown and epoch[:8] in shown and epoch not in shown
    finally:
        await cluster.stop()


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
        store.learn(directory, store.prefix.encode() + key, record.encode(found))
    assert directory.names() == []
    store.learn(directory, store.prefix.encode() + found.name.encode(), record.encode(found))
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
    job = Job(1, RequestId("r"), (), (4,), (5,), (), (), 1.0)
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
