# SPDX-License-Identifier: Apache-2.0
"""Moves under vLLM's model runner V2, the default on GPUs, on CPUs in Triton's interpreter (``tests/interpreter``)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from benchmarks.migration.equal import Counts

pytestmark = [pytest.mark.integration, pytest.mark.slow]
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("family", "prompts"),
    [
        # The state passes into its next block, of 1,056 tokens, between the moves.
        ("qwen3-next", "1031,40"),
        ("gpt-oss", "90,300"),
        ("deepseek-v3", "90,300"),
    ],
)
def test_moved_answers_equal_unmoved_ones(tmp_path: Path, family: str, prompts: str) -> None:
    """Of models with states, windows and compressed heads, prefilled here and elsewhere."""
    path = os.pathsep.join([str(ROOT / "tests" / "interpreter"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "tests.integration.families", "--families", family, "--caching", "on"]
    command += ["--requests", "2", "--tokens", "60", "--prompts", prompts, "--json", str(tmp_path / "counts.json")]
    # Greedy, and with penalties and a seed; the interpreter does not run vLLM's kernel of top_p.
    command += ["--kinds", "greedy,penalties"]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=True, timeout=900, cwd=ROOT)
    counts = msgspec.json.decode((tmp_path / "counts.json").read_bytes(), type=Counts)
    assert {cell.runner for cell in counts.cells} == {"v2"}
    assert sum(cell.answers for cell in counts.cells) == 6
