# SPDX-License-Identifier: Apache-2.0
"""Programs that the documentation runs with ``python -m`` explain themselves, and have the options that it names."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.documents import ROOT, modules

pytestmark = [pytest.mark.integration, pytest.mark.slow]
# The first takes dynamo.vllm's arguments, of which tests/integration/test_adding.py runs some; the second none.
OTHERS = {"components.worker", "scripts.reference", "examples.transfer_two_processes"}


@pytest.mark.parametrize("module", sorted(set(modules()) - OTHERS))
def test_help_has_the_options_that_pages_name(module: str) -> None:
    command = [sys.executable, "-m", module, "--help"]
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert modules()[module] <= set(re.findall(r"--[\w-]+", done.stdout))
