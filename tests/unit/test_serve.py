# SPDX-License-Identifier: Apache-2.0
"""What ``dynamo serve`` makes of graphs, files and arguments, without starting anything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from components.errors import ConfigError, TransferUnavailable
from components.serve.graph import load
from components.serve.plan import Plan, make_plan, parse_overrides, read_yaml
from components.transfer import lanes
from components.transfer.config import Transport

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


def test_transport_sets_ucx_before_the_engine_starts() -> None:
    decode = plan("disagg", transport=Transport.TCP).processes[1]
    assert decode.environment["UCX_TLS"] == "tcp,cuda_copy,self"
    assert "UCX_TLS" not in plan("disagg").processes[1].environment


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--DecodWorker.replicas=2"], "did you mean 'DecodeWorker'"),
        (["--DecodeWorker.max-model-length=2"], "did you mean 'max-model-len'"),
        (["--DecodeWorker.replicas=many"], "DecodeWorker.replicas = 'many'"),
        (["--DecodeWorker.kv-memory-gib=5000"], "lower kv-memory-gib"),
        (["--Common.modl=x"], "did you mean 'model'"),
        (["replicas=2"], "is no override"),
    ],
)
def test_wrong_input_is_named_with_the_fix(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan("disagg", *arguments)


@pytest.mark.parametrize("target", ["graphs.disag:Frontend", "graphs.disagg:Frontent", "graphs.disagg"])
def test_unknown_graphs_and_entries_are_refused(target: str) -> None:
    with pytest.raises(ConfigError):
        load(target)


def test_ib_without_a_device_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "RDMA_DEVICES", tmp_path / "none")
    with pytest.raises(TransferUnavailable, match="RDMA device"):
        plan("disagg", transport=Transport.IB)


def test_the_command_ends_with_one_line_and_code_2() -> None:
    command = [sys.executable, "-m", "components.cli", "serve", "graphs.nope:Frontend"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: there is no graph module")
