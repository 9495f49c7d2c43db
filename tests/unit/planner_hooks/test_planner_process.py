# SPDX-License-Identifier: Apache-2.0
"""The planner's process: Dynamo's planner without the package that only its SLA target needs."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

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


class Exited(Exception):
    """Instead of the process's end."""


@pytest.mark.parametrize("cut_off", [False, True])
async def test_a_planner_that_has_lost_its_lease_ends_whatever_it_waits_for(
    cut_off: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from components.planner import __main__ as planner

    never: asyncio.Future[None] = asyncio.Future()

    class Endpoint:
        async def serve_endpoint(self, _: object) -> None:
            if not cut_off:
                await never

    def end(code: int) -> None:
        assert code == 1
        raise Exited

    async def init_planner(runtime: object, config: str) -> None:
        assert config == "config"
        if cut_off:
            await never

    monkeypatch.setattr(planner.os, "_exit", end)
    runtime = SimpleNamespace(endpoint=lambda _: Endpoint())
    with pytest.raises(Exited) if cut_off else nullcontext():
        await planner._while_in_etcd(init_planner, runtime, "config")


def test_dynamos_planner_has_the_function_that_is_wrapped() -> None:
    from dynamo.planner import __main__ as stock

    assert list(inspect.signature(stock.init_planner).parameters) == ["runtime", "config"]
