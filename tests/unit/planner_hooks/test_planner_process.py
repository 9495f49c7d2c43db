# SPDX-License-Identifier: Apache-2.0
"""The planner's process: Dynamo's planner without the package that only its SLA target needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from components.config import PlannerConfig
from planner_hooks import perf_model


def planner(keys: dict[str, object]) -> str:
    """What the component's process says at its end."""
    variables = {"DYN_MIGRATE_CONFIG": json.dumps(keys), "DYN_MIGRATE_COMPONENT": "Planner"}
    command = [sys.executable, "-m", "components.planner"]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    return done.stderr


@pytest.mark.skipif(perf_model.installed(), reason="aisimulate_core is installed")
def test_the_sla_target_says_what_it_needs() -> None:
    assert "aisimulate_core" in planner({"planner-args": {"optimization_target": "sla"}})


def test_two_planners_of_one_host_share_no_port() -> None:
    from components.planner.__main__ import planner_file

    assert planner_file(PlannerConfig(), "dynamo")["control_api_port"] == 0
