# SPDX-License-Identifier: Apache-2.0
"""The policy file: errors name the key and the nearest existing one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.errors import ConfigError
from components.serve.plan import read_yaml
from planner_hooks.config import load, parse
from planner_hooks.policies import BUILT_IN
from planner_hooks.simulate import traces


def test_an_empty_file_means_every_policy_with_its_defaults() -> None:
    assert [name for name, _, _ in parse({}).policies] == list(BUILT_IN)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"policies": {"balanse": {}}}, "did you mean 'balance'"),
        ({"policies": {"balance": {"start-gab": 1}}}, "did you mean 'start-gap'"),
        ({"limit": {}}, "did you mean 'limits'"),
        ({"limits": {"cooldown": 1}}, "did you mean 'cooldown-s'"),
        ({"policies": {"balance": {"start-gap": "wide"}}}, "policies.balance.start-gap = 'wide'"),
        ({"policies": {"balance": {"start-gap": 0.1, "stop-gap": 0.2}}}, "stop-gap (0.2) must be below"),
        ({"limits": {"max-moves-per-pair": 17}}, "exceeds max-moves-per-worker"),
        ({"limits": {"no-return-s": 1}}, "shorter than cooldown-s"),
        ({"limits": {"stale-after-s": 0.5}}, "shorter than interval-s"),
        ({"limits": {"max-destination-usage": 0.5}}, "exceeds limits.max-destination-usage"),
        ({"policies": {"mine": {"module": "no.such"}}}, "no module 'no.such'"),
        ({"policies": {"mine": {"module": "json"}}}, "names no class in POLICY"),
        ({"policies": ["balance"]}, "expected the policies' names"),
    ],
)
def test_mistakes_are_named(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=".*") as caught:
        parse(values)
    assert expected in str(caught.value)


def test_a_file_that_is_not_there_or_not_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no policy file"):
        load(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"bad.yaml is not YAML: line 1: expected the node content, [^\n]*$"):
        load(tmp_path / "bad.yaml")


@pytest.mark.parametrize("read", [load, read_yaml, traces.read])
def test_a_folder_in_place_of_a_file(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path)
    assert str(caught.value) == f"{tmp_path} cannot be read: Is a directory"


def test_every_field_is_documented() -> None:
    for _, _, config in parse({}).policies:
        for name, field in type(config).model_fields.items():
            assert field.description, f"{type(config).__module__}.{name}"
