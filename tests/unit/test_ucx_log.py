# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501 (lines as UCX prints them)
"""The reported lane is the one in UCX's tables for the right operation and place."""

from __future__ import annotations

import os

import pytest

from components.transfer.data.ucx import Tables, UcxLog

OUTPUT = """
[1.0] [vm:1:1]   | ucp_context_0 intra-node cfg#1 | active message by ucp_am_send*(egr) from host memory    |
[1.0] [vm:1:1]   |                     16516..inf | multi-frag copy-in                             | tcp/lo |
[1.0] [vm:1:1]   +--------------------------------+------------------------------------------------+--------+
[1.0] [vm:1:1]   | ucp_context_0 intra-node cfg#1 | remote memory read by ucp_get*(multi) into host memory from host    |
[1.0] [vm:1:1]   |                         0..inf | zero-copy                                       | cma/memory |
[1.0] [vm:1:1]   | ucp_context_0 inter-node cfg#2 | remote memory write by ucp_put*(multi) from cuda/GPU0 memory to cuda |
[1.0] [vm:1:1]   |                        0..2047 | short                                           | tcp/eth0 |
[1.0] [vm:1:1]   |                      2048..inf | zero-copy              | 50% on rc_mlx5/mlx5_0:1 and 50% on rc_mlx5/mlx5_1:1 |
"""  # noqa: E501

SINCE_1_22 = """
[1.0] [vm:1:1]   | ucp_context_0 intra-node cfg#1                                   |
[1.0] [vm:1:1]   | active message by ucp_am_send* from host memory                  |
[1.0] [vm:1:1]   |   Range    |    Description     |    Config                       |
[1.0] [vm:1:1]   | 16516..inf | multi-frag copy-in | tcp/lo                          |
[1.0] [vm:1:1]   | ucp_context_0 intra-node cfg#1                                   |
[1.0] [vm:1:1]   | remote memory read by ucp_get*(multi) into host memory from host |
[1.0] [vm:1:1]   |   Range    |    Description     |    Config                       |
[1.0] [vm:1:1]   | 0..inf     | zero-copy          | cma/memory                      |
[1.0] [vm:1:1]   | ucp_context_0 inter-node cfg#2                                   |
[1.0] [vm:1:1]   | remote memory write by ucp_put*(multi) from cuda/GPU0 memory     |
[1.0] [vm:1:1]   | 0..2047    | short              | tcp/eth0                        |
[1.0] [vm:1:1]   | 2048..inf  | zero-copy | 50% on rc_mlx5/mlx5_0:1 and 50% on rc_mlx5/mlx5_1:1 |
"""


@pytest.mark.parametrize("output", [OUTPUT, SINCE_1_22])
def test_lanes_by_place_and_operation(output: str) -> None:
    tables = Tables()
    for line in output.splitlines():
        tables.read(line)
    assert tables.lanes == {
        ("intra-node", "READ"): ("cma/memory",),
        ("inter-node", "WRITE"): ("rc_mlx5/mlx5_0:1", "rc_mlx5/mlx5_1:1"),
    }


def test_what_ucx_writes_is_read_and_its_warnings_are_passed_on(caplog: pytest.LogCaptureFixture) -> None:
    log = UcxLog()
    with log.listening():
        path = os.environ["UCX_LOG_FILE"]
        with open(path, "w") as out:
            out.write(OUTPUT + "[1.0] [vm:1:1] ucp_context.c:1433 UCX  WARN  transport 'x' is not available\nhalf a li")
    assert "UCX_LOG_FILE" not in os.environ and "UCX_PROTO_INFO" not in os.environ
    assert (log.lane("READ", True), log.lane("WRITE", False), log.lane("WRITE", True)) == ("cma", "rc_mlx5", "rc_mlx5")
    assert "transport 'x' is not available" in caplog.text


def test_the_users_own_settings_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_LOG_FILE", "mine.log")
    log = UcxLog()
    with log.listening():
        assert os.environ["UCX_LOG_FILE"] == "mine.log" and "UCX_PROTO_INFO" not in os.environ
    assert log.lane("READ", True) == ""
