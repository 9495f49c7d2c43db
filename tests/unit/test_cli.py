# SPDX-License-Identifier: Apache-2.0
"""Errors of commands: the cause, the value and the fix, never a traceback. Imports of commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from components import process
from components.cli import app
from components.client import Workers
from components.errors import ConfigError, MigrateError
from components.serve import state
from components.serve.servers import free_port

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No graph is known here, whatever the developer has running."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("ETCD_ENDPOINTS", "")  # Set and not deleted: commands write it, and it must not stay.
    monkeypatch.chdir(ROOT)


def refused(*words: str) -> str:
    result = CliRunner().invoke(app, words)
    assert result.exit_code != 0
    return str(result.exception) if isinstance(result.exception, MigrateError) else result.output


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("servee", "Did you mean 'serve'"),
        ("serve", "Missing argument 'graph'"),
        ("serve graphs.disagg", "write graphs.disagg:Frontend"),
        ("serve graphs.disagg:Frontent --dry-run", "did you mean 'Frontend'"),
        ("serve graphs.disagg:Frontend -f nope.yaml --dry-run", "there is no configuration file nope.yaml"),
        ("serve graphs.disagg:Frontend --nixl-transport rdma --dry-run", "'rdma' is not one of"),
        ("serve graphs.disagg:Frontend --Common.model=/nowhere --dry-run", "no model folder /nowhere; known names"),
        ("serve graphs.disagg:Frontend --only Decode --dry-run", "did you mean 'DecodeWorker'"),
        ("demo --once --Common.modell=tiny-llama --port 1", "Common has no key 'modell'; did you mean 'model'"),
        ("status", "start one with `dynamo serve`, or set ETCD_ENDPOINTS"),
        ("top --once", "start one with `dynamo serve`, or set ETCD_ENDPOINTS"),
        ("migrate", "Missing argument 'request'"),
        ("migrate r", "start one with `dynamo serve`, or set ETCD_ENDPOINTS"),
        ("drain", "Missing argument 'worker'"),
        ("policy explain --policy-file nope.yaml", "there is no policy file nope.yaml"),
        ("policy explain --snapshot README.md", "README.md is no snapshot"),
        ("policy explain --snapshot no.json", "snapshot no.json cannot be read: No such file or directory; write one"),
    ],
)
def test_a_wrong_use_is_told_with_its_fix(words: str, told: str) -> None:
    assert told in refused(*words.split())


def test_an_etcd_that_does_not_answer_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("ETCD_ENDPOINTS", f"http://{address}")
    assert f"etcd does not answer at {address}" in refused("status")


def test_an_address_that_is_none_is_told_with_an_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ETCD_ENDPOINTS", "nonsense")
    assert "ETCD_ENDPOINTS = 'nonsense': write HOST:PORT" in refused("status")


def test_a_command_finds_the_graph_that_was_started_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_NAMESPACE", "mine")
    state.remember(state.State.of_this_process("mine", "http://127.0.0.1:1", 8000))
    state.join()
    assert os.environ["ETCD_ENDPOINTS"] == "http://127.0.0.1:1"
    with pytest.raises(ConfigError, match=r"etcd does not answer at 127\.0\.0\.1:1"):
        state.reach()


@pytest.mark.parametrize(("words", "code"), [("drain 9e28", 130), ("migrate 6232", 130), ("top", 0)])
def test_ctrl_c_ends_only_the_watching_command_well(words: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(state, "reach", lambda: None)
    monkeypatch.setattr(process, "connect", lambda: None)
    monkeypatch.setattr(Workers, "connect", interrupted)
    monkeypatch.setattr(os, "_exit", leave)
    assert CliRunner().invoke(app, words.split()).exit_code == code


HEAVY = ("numpy", "torch", "vllm", "nixl", "httpx", "aiohttp", "grpc", "prometheus_client", "planner_hooks")
"""Modules with imports as slow as a whole command should be."""
UNTIL_NEEDED = (*HEAVY, "dynamo", "pydantic", "yaml", "uvloop", "psutil")
SHOWN = "import sys, components.cli; print(*[name for name in {names} if name in sys.modules])"
ASKED = """
import asyncio, os, sys
from components import process
from components.cli import app
try:
    app(["status"])
except Exception as error:
    print(error)
async def connect():
    process.connect()
asyncio.run(connect())
print(*[name for name in {names} if name in sys.modules], flush=True)
os._exit(0)
"""


def lines(program: str, names: tuple[str, ...]) -> list[str]:
    environment = os.environ | {"ETCD_ENDPOINTS": "http://127.0.0.1:1", "DYN_DISCOVERY_BACKEND": "mem"}
    command = [sys.executable, "-c", program.format(names=names)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


def test_help_imports_nothing_that_only_commands_need() -> None:
    assert lines(SHOWN, UNTIL_NEEDED) == [""]


def test_status_imports_neither_engine_nor_numbers() -> None:
    told, imported = lines(ASKED, HEAVY)
    assert "etcd does not answer at 127.0.0.1:1" in told
    assert imported == ""
