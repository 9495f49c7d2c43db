# SPDX-License-Identifier: Apache-2.0
"""Moves under vLLM's model runner V2, the default on GPUs, on CPUs in Triton's interpreter (``tests/interpreter``)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from benchmarks.migration.equal import Counts

pytestmark = [pytest.mark.integration, pytest.mark.slow]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where Python finds Triton, which an installation for CPUs leaves out: that of the one for GPUs."""
    [triton] = re.findall(r"^triton==\S+", (ROOT / "requirements-gpu.lock").read_text(), re.MULTILINE)
    folder = tmp_path_factory.mktemp("triton")
    install = [Path(sys.executable).with_name("uv"), "pip", "install", "--quiet", "--python", sys.executable]
    subprocess.run([*install, "--no-deps", "--target", folder, triton], check=True)
    parts = (str(ROOT / "tests" / "interpreter"), str(ROOT), str(folder), os.environ.get("PYTHONPATH", ""))
    return os.pathsep.join(parts)


def run(path: str, *arguments: str) -> None:
    environment = os.environ | {"PYTHONPATH": path}
    subprocess.run([sys.executable, "-m", *arguments], env=environment, check=True, timeout=900, cwd=ROOT)


@pytest.mark.parametrize(
    ("family", "prompts"),
    [
        # The state passes into its next block, of 1,056 tokens, between the moves.
        ("qwen3-next", "1031,40"),
        ("gpt-oss", "90,300"),
        ("deepseek-v3", "90,300"),
    ],
)
def test_moved_answers_equal_unmoved_ones(path: str, tmp_path: Path, family: str, prompts: str) -> None:
    """Of models with states, windows and compressed heads, prefilled here and elsewhere."""
    asked = ["--families", family, "--caching", "on", "--requests", "2", "--tokens", "60", "--prompts", prompts]
    # Greedy, and with penalties and a seed; the interpreter does not run vLLM's kernel of top_p.
    asked += ["--kinds", "greedy,penalties", "--json", str(tmp_path / "counts.json")]
    run(path, "tests.integration.families", *asked)
    counts = msgspec.json.decode((tmp_path / "counts.json").read_bytes(), type=Counts)
    assert {cell.runner for cell in counts.cells} == {"v2"}
    assert sum(cell.answers for cell in counts.cells) == 6


@pytest.mark.parametrize("kind", ["greedy", "seeded"])
def test_answers_about_images_that_move_equal_unmoved_ones(path: str, kind: str) -> None:
    """The same tests as with V1, in each mode."""
    run(path, "pytest", "-q", "tests/integration/test_vllm_images.py", "-m", "integration", "-k", kind)
