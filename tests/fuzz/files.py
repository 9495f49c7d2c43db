# SPDX-License-Identifier: Apache-2.0
"""Parsers of files and arguments that people write."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path

from components.cli.policy import read as read_snapshot
from components.config import FrontendConfig, PlannerConfig, WorkerConfig, parse
from components.errors import ConfigError
from components.serve.plan import make_plan, parse_overrides, read_yaml
from components.transfer.config import Transport
from graphs.planner import Frontend
from planner_hooks import config as policies
from planner_hooks.simulate import traces
from tests.fuzz.inputs import Target


@cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="fuzz-"))


def _file(data: bytes) -> Path:
    path = _folder() / "input"
    path.write_bytes(data)
    return path


def component_configs(data: bytes) -> None:
    """What a component's process finds in its environment."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(values, dict):
        for model in (WorkerConfig, FrontendConfig, PlannerConfig):
            try:
                parse(model, "Component", values)
            except ConfigError:
                continue


def graph_configs(data: bytes) -> None:
    """A file for ``dynamo serve -f``."""
    make_plan(Frontend, read_yaml(_file(data)), {}, Transport.AUTO, {}).shown()


def overrides(data: bytes) -> None:
    """A ``--Component.key=value`` argument."""
    parse_overrides([data.decode(errors="surrogateescape")])


def policy_files(data: bytes) -> None:
    """A policy file."""
    policies.load(_file(data)).build()


def snapshots(data: bytes) -> None:
    """A snapshot for ``dynamo policy explain``."""
    read_snapshot(_file(data))


def trace_files(data: bytes) -> None:
    """A trace for ``dynamo policy replay``."""
    traces.read(_file(data))


TARGETS = [
    Target("component-config", component_configs, "json"),
    Target("graph-config", graph_configs, "yaml"),
    Target("override", overrides, "bytes"),
    Target("policy", policy_files, "yaml"),
    Target("snapshot", snapshots, "json"),
    Target("trace", trace_files, "json"),
]
