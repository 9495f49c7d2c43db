# SPDX-License-Identifier: Apache-2.0
"""The programs under ``examples/`` do what they say."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.integration.graphs import ROOT


def run(*arguments: str, timeout_s: float = 250) -> str:
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


@pytest.mark.integration
def test_transfer_between_two_processes() -> None:
    assert "every layer has the source's bytes" in run("examples.transfer_two_processes")


@pytest.mark.integration
@pytest.mark.slow
def test_migration_between_two_plain_vllm_engines() -> None:
    assert "exactly the tokens of the unmoved one" in run("examples.migrate_in_vllm", "--model", "tiny-llama")
