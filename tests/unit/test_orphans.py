# SPDX-License-Identifier: Apache-2.0
"""Any end of a process also ends its children: the engine of a worker, and everything of a launcher."""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from components import lifeline
from components.errors import ConfigError
from components.serve import family, state
from components.serve.plan import Plan, Process
from components.serve.supervisor import Supervisor
from components.serve.warden import follow

ROOT = Path(__file__).parents[2]

WORKER = """
import os, pathlib, subprocess, sys
engine = subprocess.Popen(["sleep", "1000"])
seen = pathlib.Path(sys.argv[1])
before = seen.read_text().split() if seen.exists() else []
left = [pid for pid in before if os.path.exists(f"/proc/{pid}") and "Z" not in open(f"/proc/{pid}/stat").read()]
seen.write_text(" ".join([*before, str(engine.pid)]))
seen.with_suffix(".left").write_text(" ".join(left))
pathlib.Path(os.environ["DYN_MIGRATE_READY_FILE"]).touch()
engine.wait()
"""

SHARER = """
import multiprocessing.shared_memory, os, pathlib, sys, time
memory = multiprocessing.shared_memory.SharedMemory(create=True, size=4096)
pathlib.Path(sys.argv[1]).write_text(memory.name)
time.sleep(1000)
"""


def wait_for(what: Callable[[], object], timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


class Watched:
    """A supervisor on processes of Python code, its output, and the end of it."""

    def __init__(self, limit: int = 5, **codes: list[str]) -> None:
        processes = [
            Process(component=name, replica=0, command=["python", "-c", *code], environment={})
            for name, code in codes.items()
        ]
        self.output = io.StringIO()
        plan = Plan(namespace="test", transport="auto", model="m", processes=processes)
        self.supervisor = Supervisor(plan, os.environ, Console(file=self.output, width=200))
        self.running = asyncio.ensure_future(self.supervisor.run(restart_limit=limit))

    async def until(self, what: Callable[[str], bool]) -> str:
        async with asyncio.timeout(60):
            while not what(self.output.getvalue()):
                assert not self.running.done(), self.output.getvalue()
                await asyncio.sleep(0.02)
        return self.output.getvalue()

    def pid(self, number: int) -> int:
        handle = self.supervisor.children[number].handle
        assert handle is not None
        return handle.pid

    async def stop(self) -> None:
        self.supervisor.stop()
        await self.running


async def test_the_engine_of_a_killed_worker_is_gone_before_its_successor_starts(tmp_path: Path) -> None:
    seen = tmp_path / "engines"
    watched = Watched(Worker=[WORKER, str(seen)])
    await watched.until(lambda said: "ready" in said)
    os.kill(watched.pid(0), signal.SIGKILL)
    await watched.until(lambda _: len(seen.read_text().split()) == 2)
    await watched.until(lambda _: seen.with_suffix(".left").exists())
    assert seen.with_suffix(".left").read_text() == ""
    await watched.stop()
    assert all(gone(int(pid)) for pid in seen.read_text().split())


async def test_a_process_that_ends_again_and_again_delays_no_other(tmp_path: Path) -> None:
    ready = "import os, pathlib, time; pathlib.Path(os.environ['DYN_MIGRATE_READY_FILE']).touch(); "
    watched = Watched(9, Bad=[ready + "time.sleep(0.3)"], Good=[ready + "time.sleep(1000)"])
    await watched.until(lambda said: "restart 3 of 9 in 4 s" in said)
    first = watched.pid(1)
    os.kill(first, signal.SIGKILL)
    said = await watched.until(lambda _: watched.pid(1) != first)
    assert "restart 4 of 9" not in said
    await watched.stop()


async def test_shared_memory_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", SHARER, str(tmp_path / "name")], start_new_session=True)
    wait_for(lambda: (tmp_path / "name").exists() and (tmp_path / "name").read_text())
    memory = Path("/dev/shm") / (tmp_path / "name").read_text()
    assert memory.exists()
    # Until it has begun, the process that removes it cannot be told from the one that it belongs to.
    wait_for(lambda: any(family._is_tracker(member) for member in family.alive(process.pid)))
    await family.end([process.pid])
    process.wait()
    assert not memory.exists()
    assert family.alive(process.pid) == []


def test_a_tied_process_ends_with_its_parent_even_without_a_warden(tmp_path: Path) -> None:
    code = (
        "import pathlib, subprocess, sys, time; from components.serve import family; "
        "child = subprocess.Popen(family.tied(['sleep', '1000']), start_new_session=True); "
        "pathlib.Path(sys.argv[1]).write_text(str(child.pid)); time.sleep(1000)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "pid")])
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    child = int((tmp_path / "pid").read_text())
    wait_for(lambda: psutil.Process(child).name() == "sleep")
    parent.kill()
    parent.wait()
    wait_for(lambda: gone(child))


def test_a_tied_process_does_not_begin_once_its_parent_has_ended(tmp_path: Path) -> None:
    slow = tmp_path / "setpriv"
    slow.write_text(f'#!/bin/sh\nwhile kill -0 $PARENT; do sleep 0.05; done\nexec {shutil.which("setpriv")} "$@"\n')
    slow.chmod(0o755)
    code = (
        "import os, pathlib, subprocess, sys; from components.serve import family; "
        "os.environ['PARENT'] = str(os.getpid()); "
        "child = subprocess.Popen(family.tied(['touch', sys.argv[1]]), start_new_session=True); "
        "pathlib.Path(sys.argv[2]).write_text(str(child.pid)); os._exit(0)"
    )
    path = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "-c", code, str(tmp_path / "begun"), str(tmp_path / "pid")]
    subprocess.run(command, env=os.environ | path, check=True)
    child = int((tmp_path / "pid").read_text())
    wait_for(lambda: gone(child))
    assert not (tmp_path / "begun").exists()


def test_a_tied_process_has_all_variables() -> None:
    found = subprocess.run(family.tied(["env"]), env=os.environ | {"a.b-c": "d"}, capture_output=True, text=True)
    assert "a.b-c=d" in found.stdout.splitlines()


@pytest.mark.parametrize("way", ["spawn", "fork"])
def test_a_process_of_multiprocessing_ends_with_its_parent_though_nobody_watches(tmp_path: Path, way: str) -> None:
    code = (
        "import multiprocessing, sys, time\nfrom tests.unit.test_orphans import live_on\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context(sys.argv[1])\n"
        "    context.Process(target=live_on, args=(sys.argv[2],)).start(); time.sleep(1000)\n"
    )
    (tmp_path / "parent.py").write_text(code)
    command = [sys.executable, str(tmp_path / "parent.py"), way, str(tmp_path / "pid")]
    environment = dict(os.environ) | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    parent = subprocess.Popen(command, env=environment)
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    parent.kill()
    parent.wait()
    wait_for(lambda: gone(int((tmp_path / "pid").read_text())))


def live_on(path: str) -> None:
    """A process that watches its parent, and never ends by itself."""
    lifeline.end_with_parent()
    Path(path).write_text(str(os.getpid()))
    time.sleep(1000)


def test_a_line_that_the_launchers_end_cut_off_names_nothing() -> None:
    lines = [b"+session 12\n", b"+session 13\n", b"-session 12\n", b"+path /a b\n", b"+path /hom"]
    assert follow(lines) == ({13}, {Path("/a b")})


@pytest.fixture
def runtime_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("ETCD_ENDPOINTS", raising=False)
    return tmp_path


def test_a_state_file_of_another_process_with_the_same_number_is_not_believed(runtime_folder: Path) -> None:
    mine = state.State.of_this_process("mine", "http://127.0.0.1:1", 8000)
    stale = state.State("old", "http://127.0.0.1:1", 8000, os.getpid(), mine.started - 1)
    state.remember(stale)
    with pytest.raises(ConfigError, match="no running system is known"):
        state.join()
    assert not stale.path.exists()
    state.remember(mine)
    state.join()
    assert os.environ.pop("ETCD_ENDPOINTS") == "http://127.0.0.1:1"
