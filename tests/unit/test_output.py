# SPDX-License-Identifier: Apache-2.0
"""Commands print in any locale; what an encoding lacks is an escape, never an error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from components.serve.surroundings import is_noise, quiet, surroundings

ROOT = Path(__file__).parents[2]
LOCALES = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "latin-1": {"PYTHONIOENCODING": "latin-1:strict"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}
CODE = """
import asyncio, os
from rich.console import Console
from components import output
from components.serve.plan import Plan, Process
from components.serve.supervisor import Supervisor
output.take_any_text()
code = "import os, pathlib; print('caf\\u00e9 \\u8336'); pathlib.Path(os.environ['DYN_MIGRATE_READY_FILE']).touch()"
process = Process(component="Worker", replica=0, command=["python", "-c", code + "; input()"], environment={})
plan = Plan(namespace="test", transport="auto", model="m", processes=[process])
environment = dict(os.environ) | {"PYTHONIOENCODING": "utf-8"}
async def main():
    watched = Supervisor(plan, environment, Console())
    await watched.run(restart_limit=0)
asyncio.run(main())
"""


def ran(code: int, *command: str, **variables: str) -> str:
    environment = dict(os.environ) | variables
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, encoding="latin-1", timeout=120
    )
    assert "UnicodeEncodeError" not in done.stderr and done.returncode == code, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("locale", LOCALES)
def test_commands_print_in_any_locale(locale: str) -> None:
    variables = LOCALES[locale]
    ran(0, "-m", "components.cli", "serve", "--help", **variables)
    ran(2, "-m", "components.cli", "policy", "explain", "--policy-file", "caf\u00e9-\u8336.yaml", **variables)


@pytest.mark.parametrize("locale", ["ascii", "latin-1"])
def test_the_launcher_prints_what_processes_say(locale: str) -> None:
    said = ran(1, "-c", CODE, **LOCALES[locale])
    assert {"ascii": "Worker.0 | caf\\xe9 \\u8336", "latin-1": "Worker.0 | caf\u00e9 \\u8336"}[locale] in said


def test_lines_of_dynamos_for_each_call_are_left_out_unless_they_are_asked_for() -> None:
    line = b"\x1b[32m INFO\x1b[0m router.route_request: request_span: route request completed"
    assert is_noise(line, surroundings({})) and is_noise(line, {"DYN_LOG": "error"})
    assert not is_noise(line, {"DYN_LOG": "info"}) and not is_noise(line.replace(b"INFO", b"WARN"), surroundings({}))
    assert not is_noise(b" INFO components.worker.mocker: serves", surroundings({}))
    mine, theirs, demo = {"DYN_LOG": "info"}, dict[str, str](), {"DYN_LOG": "error,mm_routing=off"}
    for each in (mine, theirs, demo):
        quiet(each)
    assert mine == {"DYN_LOG": "info"} and theirs["DYN_LOG"] == "error"
    assert theirs["DYNAMO_SKIP_PYTHON_LOG_INIT"] == demo["DYNAMO_SKIP_PYTHON_LOG_INIT"] == "1"
