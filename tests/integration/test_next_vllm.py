# SPDX-License-Identifier: Apache-2.0
"""The engine's contract and exactness on the release after the tested one, in a separate environment.

Served graphs are left out: the vLLM worker of Dynamo 1.6.1 cannot be imported with vLLM 0.32.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from components import versions

pytestmark = [pytest.mark.integration, pytest.mark.slow]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def python() -> str:
    """The environment's interpreter. Making it takes a quarter of a minute with the packages cached."""
    made = subprocess.run(
        [ROOT / "scripts/next.sh", versions.NEXT["vllm"]], stdout=subprocess.PIPE, text=True, check=True
    )
    return str(ROOT / made.stdout.strip())


@pytest.mark.parametrize("tests", ["unit/test_vllm_names.py", "integration/test_vllm_handover.py"])
def test_the_next_vllm_passes(python: str, tests: str) -> None:
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "slow or not slow", f"tests/{tests}"]
    done = subprocess.run(
        command, cwd=ROOT, env=dict(os.environ), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-8000:]
