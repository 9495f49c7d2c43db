# SPDX-License-Identifier: Apache-2.0
"""What ``dynamo serve`` makes of graphs, files and arguments, without starting anything."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import types
import uuid
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from components.cli.serve import resolve as resolve_plan
from components.engine.vllm.engine import VLLMEngine
from components.errors import ConfigError, TransferUnavailable
from components.models import resolve
from components.serve import precision
from components.serve.config import WorkerConfig, parse
from components.serve.graph import load
from components.serve.plan import Plan, make_plan, parse_overrides, read_yaml
from components.transfer import lanes
from components.transfer.config import Transport
from components.worker.engines import build_engine
from tests.conftest import free_port

CONFIGS = Path(__file__).parents[2] / "configs"


def plan(name: str, *arguments: str, transport: Transport = Transport.AUTO) -> Plan:
    graph = "graphs.agg:Frontend" if name == "agg" else "graphs.disagg:Frontend"
    values = read_yaml(CONFIGS / f"{name}.yaml")
    return make_plan(load(graph), values, parse_overrides(list(arguments)), transport, {})


@pytest.mark.parametrize("name", ["agg", "disagg", "disagg_gpu", "disagg_gpu_mixtral"])
def test_every_configuration_gives_a_plan(name: str) -> None:
    found = json.loads(plan(name).shown())
    assert found["processes"][-1]["component"] == "Frontend"
    assert "--namespace" in found["processes"][-1]["command"]


def test_gpu_replicas_get_their_own_devices() -> None:
    devices = [p.environment["CUDA_VISIBLE_DEVICES"] for p in plan("disagg_gpu").processes if "Worker" in p.component]
    assert devices == ["0,1", "4,5", "6,7"]


def test_overrides_reach_the_component_and_replicas_multiply() -> None:
    found = plan("disagg", "--DecodeWorker.replicas=3", "--DecodeWorker.max-model-len=512")
    decode = [p for p in found.processes if p.component == "DecodeWorker"]
    assert len(decode) == 3
    assert json.loads(decode[0].environment["DYN_MIGRATE_CONFIG"])["max-model-len"] == 512


@pytest.mark.parametrize(
    ("flags", "name", "dtypes"),
    [
        ("fma avx2", "disagg", {"float32"}),
        ("fma avx2 avx512f avx512bw avx512dq avx512vl", "disagg", {"auto"}),
        ("fma avx2", "disagg_gpu", {"bfloat16"}),
    ],
)
def test_a_processor_with_slow_bfloat16_serves_in_float32(
    flags: str, name: str, dtypes: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"model name\t: some\nflags\t\t: {flags}\n")
    monkeypatch.setattr(precision, "fast_bfloat16", partial(precision.fast_bfloat16, cpuinfo))
    workers = [p for p in plan(name).processes if "Worker" in p.component]
    assert {json.loads(p.environment["DYN_MIGRATE_CONFIG"])["dtype"] for p in workers} == dtypes


def test_the_planner_is_told_how_many_workers_start() -> None:
    values = read_yaml(CONFIGS / "planner.yaml")
    found = make_plan(load("graphs.planner:Frontend"), values, {}, Transport.AUTO, {})
    told = json.loads(next(p for p in found.processes if p.component == "Planner").environment["DYN_MIGRATE_CONFIG"])
    assert told["started"] == {"prefill": 1, "decode": 2}
    assert (told["decode-workers"], told["prefill-workers"]) == ([1, 2], [1, 1])


def test_transport_sets_ucx_before_the_engine_starts() -> None:
    decode = plan("disagg", transport=Transport.TCP).processes[1]
    assert decode.environment["UCX_TLS"].split(",")[0] == "tcp"
    assert "UCX_TLS" not in plan("disagg").processes[1].environment


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--DecodWorker.replicas=2"], "did you mean 'DecodeWorker'"),
        (["--DecodeWorker.max-model-length=2"], "did you mean 'max-model-len'"),
        (["--DecodeWorker.replicas=many"], "DecodeWorker.replicas = 'many'"),
        (["--DecodeWorker.kv-memory-gib=5000"], "lower kv-memory-gib"),
        (["--Common.modl=x"], "did you mean 'model'"),
        (["replicas=2"], "for example --DecodeWorker.replicas=3"),
        (["--DecodeWorker.replicas"], "write --DecodeWorker.replicas=VALUE"),
    ],
)
def test_wrong_input_is_named_with_the_fix(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan("disagg", "--Common.dtype=bfloat16", *arguments)


def test_a_kv_cache_too_small_for_one_request_is_refused(tiny_llama: str) -> None:
    # 4 layers, 2 KV heads of 32, bfloat16: 1 KiB a token; 4,096 tokens are 4 MiB.
    model = f"--Common.model={tiny_llama}"
    with pytest.raises(ConfigError, match=r"holds 2097 tokens, and max-model-len = 4096: give at least 0.00391"):
        plan("disagg", "--Common.dtype=bfloat16", model, "--DecodeWorker.kv-memory-gib=0.002")
    assert plan("disagg", "--Common.dtype=bfloat16", model, "--DecodeWorker.kv-memory-gib=0.004").processes


@pytest.mark.parametrize("target", ["graphs.disag:Frontend", "graphs.disagg:Frontent", "graphs.disagg"])
def test_unknown_graphs_and_entries_are_refused(target: str) -> None:
    with pytest.raises(ConfigError):
        load(target)


def test_ib_without_a_device_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "RDMA_DEVICES", tmp_path / "none")
    with pytest.raises(TransferUnavailable, match="RDMA device"):
        plan("disagg", transport=Transport.IB)


def failed(*arguments: str, **environment: str) -> str:
    """The one line that a start which cannot be says; exit code 2, and no process left."""
    command = [sys.executable, "-m", "components.cli", "serve", *arguments]
    mark = uuid.uuid4().hex
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=dict(os.environ) | {"MARK": mark} | environment
    )
    assert done.returncode == 2, done.stderr
    assert [p for p in psutil.process_iter() if mark in _environment(p).get("MARK", "")] == []
    return done.stderr.strip().splitlines()[-1]


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def test_an_unknown_graph_ends_with_one_line_and_code_2() -> None:
    assert failed("graphs.nope:Frontend").startswith("error: there is no graph module")


def test_a_port_in_use_starts_nothing(tiny_llama: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = failed("graphs.disagg:Frontend", f"--port={port}", f"--Common.model={tiny_llama}")
    assert line.startswith(f"error: port {port} is in use") and "--port" in line


@pytest.mark.parametrize("variable", ["ETCD_ENDPOINTS", "NATS_SERVER"])
def test_a_server_that_does_not_answer_starts_nothing(tiny_llama: str, variable: str) -> None:
    where = f"127.0.0.1:{free_port()}"
    url = f"http://{where}" if variable == "ETCD_ENDPOINTS" else f"nats://{where}"
    line = failed("graphs.disagg:Frontend", f"--port={free_port()}", f"--Common.model={tiny_llama}", **{variable: url})
    assert line.startswith(f"error: {variable} names {where}, where nothing answers")


def test_a_model_folder_without_tokenizer_is_refused(tiny_llama: str, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(tiny_llama, half)
    assert resolve(str(half)) == str(half)
    (half / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="tokenizer.json or .* missing"):
        resolve(str(half))
    with pytest.raises(ConfigError, match="there is no model folder"):
        resolve(str(tmp_path / "absent"))


@pytest.mark.parametrize("more", [["--AggWorker.engine-args={load_format: dummy}"], ["--AggWorker.engine=paged"]])
def test_weights_are_asked_for_where_they_are_loaded(tiny_llama: str, tmp_path: Path, more: list[str]) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_llama, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    arguments = [f"--Common.model={bare}"]
    with pytest.raises(ConfigError, match="safetensors.* missing.*load_format"):
        resolve_plan("graphs.agg:Frontend", None, Transport.AUTO, 9000, "", arguments)
    resolve_plan("graphs.agg:Frontend", None, Transport.AUTO, 9000, "", [*arguments, *more])


@pytest.mark.parametrize("config", ["configs/disagg.yaml", None])
def test_a_model_that_an_override_replaces_need_not_be_there(
    config: str | None, tiny_llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("components.models.resolve", lambda model: asked.append(model) or model)
    arguments = [f"--Common.model={tiny_llama}"]
    plan = resolve_plan("graphs.disagg:Frontend", config and Path(config), Transport.AUTO, 9000, "", arguments)
    assert set(asked) == {tiny_llama}
    assert plan.model == tiny_llama


@pytest.mark.parametrize(
    ("given", "eager"), [({}, True), ({"devices": [[0]]}, False), ({"devices": [[0]], "enforce-eager": True}, True)]
)
def test_engines_on_gpus_take_cuda_graphs_unless_told_otherwise(given: dict[str, Any], eager: bool) -> None:
    engine = build_engine(parse(WorkerConfig, "DecodeWorker", {"model": "m", **given}), "name")
    assert isinstance(engine, VLLMEngine)
    assert engine._options.engine_args["enforce_eager"] is eager


def test_shared_memory_that_is_too_small_is_said_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def free(size: int) -> None:
        monkeypatch.setattr(os, "statvfs", lambda _: types.SimpleNamespace(f_bavail=size, f_frsize=1))

    free(64 << 20)
    [said] = plan("disagg", "--Common.tensor-parallel-size=2").said
    assert "0.06 GiB free, engines of several ranks want 0.75" in said and "--shm-size" in said
    assert plan("disagg").said == []
    free(1 << 30)
    assert plan("disagg", "--Common.tensor-parallel-size=2").said == []
