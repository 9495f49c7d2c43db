# SPDX-License-Identifier: Apache-2.0
"""Plans of ``dynamo serve`` from graphs, files and arguments, without a start."""

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
from components.config import FrontendConfig, WorkerConfig, parse
from components.errors import ConfigError, TransferUnavailable
from components.models import resolve
from components.serve import arguments, precision
from components.serve.graph import load
from components.serve.plan import Plan, make_plan, parse_overrides, read_yaml
from components.serve.servers import free_port
from components.transfer import lanes
from components.transfer.config import Transport
from tests.adapters import make_adapter
from tests.flags import flag

CONFIGS = Path(__file__).parents[2] / "configs"


def plan(name: str, *arguments: str, transport: Transport = Transport.AUTO, **environment: str) -> Plan:
    graph = "graphs.agg:Frontend" if name == "agg" else "graphs.disagg:Frontend"
    values = read_yaml(CONFIGS / f"{name}.yaml")
    return make_plan(load(graph), values, parse_overrides(list(arguments)), transport, environment)


@pytest.mark.parametrize("name", ["agg", "disagg", "disagg_gpu", "disagg_gpu_mixtral"])
def test_every_configuration_gives_a_plan(name: str) -> None:
    found = json.loads(plan(name).shown())
    assert found["processes"][-1]["component"] == "Frontend"
    assert "--router-mode=kv" in found["processes"][-1]["command"]
    workers = [p for p in found["processes"] if "Worker" in p["component"]]
    assert all(p["command"][2] == "components.worker" for p in workers)
    assert [p["role"] for p in workers] == [
        flag(p["command"], "disaggregation-mode").replace("agg", "decode") for p in workers
    ]


def test_gpu_replicas_get_their_own_devices() -> None:
    devices = [p.environment["CUDA_VISIBLE_DEVICES"] for p in plan("disagg_gpu").processes if "Worker" in p.component]
    assert devices == ["0,1", "4,5", "6,7"]


def test_overrides_reach_the_component_and_replicas_multiply() -> None:
    found = plan("disagg", "--DecodeWorker.replicas=3", "--DecodeWorker.max-model-len=512")
    decode = [p for p in found.processes if p.component == "DecodeWorker"]
    assert len(decode) == 3
    assert flag(decode[0].command, "max-model-len") == "512"


def test_replicas_may_have_tensor_parallel_sizes_of_their_own() -> None:
    sizes = "--DecodeWorker.tensor-parallel-size=[1, 2]"
    found = plan("disagg", "--DecodeWorker.replicas=3", sizes, "--DecodeWorker.devices=[[1], [2, 3], [4, 5]]")
    decode = [p for p in found.processes if p.component == "DecodeWorker"]
    assert [flag(p.command, "tensor-parallel-size") for p in decode] == ["1", "2", "2"]
    assert [p.environment["CUDA_VISIBLE_DEVICES"] for p in decode] == ["1", "2,3", "4,5"]
    assert {flag(p.command, "tensor-parallel-size") for p in found.processes if p.component == "PrefillWorker"} == {"1"}


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
    assert {flag(p.command, "dtype") for p in workers} == dtypes


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
        (["--DecodeWorker.tensor-parallel-size=[2, 0]"], "1 or more, or a list"),
        (["--DecodeWorker.devices=[[0, 1], [2]]"], "has 2 GPUs, tensor-parallel-size is 1"),
        (["--Common.modl=x"], "did you mean 'model'"),
        (["replicas=2"], "for example --DecodeWorker.replicas=3"),
        (["--DecodeWorker.replicas"], "write --DecodeWorker.replicas=VALUE"),
    ],
)
def test_wrong_input_is_named_with_the_fix(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan("disagg", "--Common.dtype=bfloat16", *arguments)


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


@pytest.mark.parametrize(
    "more",
    [
        ["--AggWorker.engine-args={load_format: dummy}"],
        ["--AggWorker.engine-args={load-format: dummy}"],
        ["--AggWorker.engine=paged"],
    ],
)
def test_weights_are_asked_for_where_they_are_loaded(tiny_llama: str, tmp_path: Path, more: list[str]) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_llama, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    arguments = [f"--Common.model={bare}"]
    with pytest.raises(ConfigError, match="has no weights.*load_format"):
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
    config = parse(WorkerConfig, "DecodeWorker", {"model": "m", **given})
    assert ("--enforce-eager" if eager else "--no-enforce-eager") in arguments.worker(config, "decode")


@pytest.mark.parametrize(
    ("devices", "share"), [([[0], [1]], None), ([[0], [0]], "0.45"), ([[0], [1], [1], [1]], "0.3")]
)
def test_replicas_that_share_a_gpu_start_with_a_part_of_it_free(devices: list[list[int]], share: str | None) -> None:
    config = parse(WorkerConfig, "AggWorker", {"model": "m", "devices": devices})
    given = arguments.worker(config, "agg")
    assert (f"--gpu-memory-utilization={share}" in given) == (share is not None)
    assert any("gpu-memory-utilization" in word for word in given) == (share is not None)


def test_shared_memory_that_is_too_small_is_said_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def free(size: int) -> None:
        monkeypatch.setattr(os, "statvfs", lambda _: types.SimpleNamespace(f_bavail=size, f_frsize=1))

    free(64 << 20)
    [said] = plan("disagg", "--Common.tensor-parallel-size=2").said
    assert "0.06 GiB free, engines of several ranks want 0.75" in said and "--shm-size" in said
    assert plan("disagg").said == []
    free(1 << 30)
    assert plan("disagg", "--Common.tensor-parallel-size=2").said == []


def test_what_plans_make_is_what_dynamos_own_programs_take(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dynamo.frontend.main import parse_args as frontend_arguments
    from dynamo.vllm.args import parse_args as worker_arguments

    adapter = make_adapter(tmp_path / "red", tiny_llama, 1)
    frontend = {
        "replicas": 2,
        "router-weights": {"temperature": 0.5, "overlap-score-credit": 0.8},
        "active-decode-blocks-threshold": 0.9,
        "session-affinity-s": 60,
        "frontend-args": {"namespace-prefix": "x"},
    }
    worker = {
        "model": tiny_llama,
        "served-model-name": "m",
        "max-num-batched-tokens": 512,
        "tool-call-parser": "hermes",
        "reasoning-parser": "qwen3",
        "lora-modules": {"red": adapter},
        "engine-args": {"load_format": "dummy", "hf-overrides": {"a": 1}, "async-scheduling": False},
    }
    monkeypatch.setattr("sys.argv", ["frontend", *arguments.frontend(parse(FrontendConfig, "Frontend", frontend), 1)])
    front = frontend_arguments()[0]
    assert (front.http_port, front.router_mode, front.migration_limit) == (8001, "kv", 64)
    assert (front.router_temperature, front.overlap_score_credit, front.router_replica_sync) == (0.5, 0.8, True)
    assert (front.active_decode_blocks_threshold, front.namespace_prefix) == (0.9, "x")
    back = worker_arguments(arguments.worker(parse(WorkerConfig, "DecodeWorker", worker), "decode"))
    engine = back.engine_args
    assert (back.component, back.served_model_name, back.use_kv_events) == ("backend", "m", True)
    assert (back.dyn_tool_call_parser, back.dyn_reasoning_parser) == ("hermes", "qwen3")
    assert (engine.max_num_batched_tokens, engine.kv_cache_memory_bytes, engine.max_lora_rank) == (512, 1 << 30, 8)
    assert (engine.load_format, engine.hf_overrides, engine.async_scheduling) == ("dummy", {"a": 1}, False)


def test_further_frontends_take_the_next_ports() -> None:
    found = plan("agg", "--Frontend.replicas=3", "--Frontend.port=9000")
    assert found.ports == [9000, 9001, 9002]
    assert found.url == "http://127.0.0.1:9000"


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [({}, "10"), ({"ETCD_LEASE_TTL": "30"}, "30"), ({"ETCD_LEASE_TTL": "30", "DYN_TCP_REQUEST_TIMEOUT": "3"}, None)],
)
def test_frontends_wait_for_a_worker_as_long_as_its_lease(environment: dict[str, str], seconds: str | None) -> None:
    worker, frontend = plan("agg", "--AggWorker.replicas=1", **environment).processes
    assert frontend.environment.get("DYN_TCP_REQUEST_TIMEOUT") == seconds
    assert "DYN_TCP_REQUEST_TIMEOUT" not in worker.environment


COMPILED = """
import numba, numpy, torch
@numba.njit(parallel=True)
def add(numbers):
    for i in numba.prange(len(numbers)):
        numbers[i] += 1
add(numpy.zeros(8))
print(torch.get_num_threads())
"""


def test_numba_leaves_an_engine_the_threads_it_was_given() -> None:
    environment = os.environ | plan("agg").processes[0].environment
    told = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout == "1\n"


def test_settings_of_workers_reach_them() -> None:
    keys = ("drain-grace-s=90", "lease-s=7", "integrity=off", "advertise-host=10.0.0.1")
    worker = plan("agg", *(f"--AggWorker.{key}" for key in keys), "--Frontend.migration-limit=0").processes[0]
    found = {name.removeprefix("DYN_MIGRATE_"): value for name, value in worker.environment.items()}
    assert (found["DRAIN_S"], found["LEASE_S"], found["INTEGRITY"]) == ("90", "7", "off")
    assert (found["HOST"], found["REPEATS"]) == ("10.0.0.1", "0")
    assert worker.stop_s > 90
