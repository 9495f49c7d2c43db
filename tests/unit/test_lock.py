# SPDX-License-Identifier: Apache-2.0
"""The lock files: requirements of pyproject.toml in the tested versions, and nothing of the machine."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from components import versions

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NEVER = {"aisimulate", "nixl-cu12", "llm", "llama-cpp-python"}
LOCKS = {
    "requirements.lock": ("cpu", "planner", "otel", "bench", "dev", "docs"),
    "requirements-gpu.lock": ("gpu", "planner", "otel"),
}


def lines(name: str) -> list[str]:
    return [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]


def pinned(name: str) -> dict[str, str]:
    """Versions for the tested Python."""
    found = {}
    for line in lines(name):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"python_full_version": "3.11.9"}):
            [pin] = requirement.specifier
            assert pin.operator == "=="
            found[canonicalize_name(requirement.name)] = pin.version
    return found


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_meets_every_requirement_of_its_extras(lock: str) -> None:
    project, have = PROJECT["project"], pinned(lock)
    needs = [*project["dependencies"], *PROJECT["dependency-groups"]["install"]]
    needs += [need for extra in LOCKS[lock] for need in project["optional-dependencies"][extra]]
    for need in map(Requirement, needs):
        assert need.specifier.contains(have[canonicalize_name(need.name)], prereleases=True), need


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_holds_the_tested_versions(lock: str) -> None:
    have = pinned(lock)
    for product in versions.TESTED:
        for name in versions.BUILDS.get(product, (product,)):
            assert name not in have or versions.is_tested(product, have[name]), name
    assert {"ai-dynamo", "nixl", "nixl-cu13"} <= have.keys()


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_names_no_place_and_nothing_that_must_not_be_installed(lock: str) -> None:
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+( ; [\w.<>='*() ]+)?", line) for line in lines(lock))
    assert not NEVER & pinned(lock).keys()


def test_the_cpu_lock_leaves_torch_to_its_own_index_and_cuda_out() -> None:
    have = pinned("requirements.lock")
    overridden = [Requirement(line) for line in lines("scripts/cpu-overrides.txt")]
    assert not {need.name for need in overridden} & have.keys()
    assert not [name for name in have if name.startswith("nvidia-")]
    assert versions.is_tested("torch", next(str(need.specifier)[2:] for need in overridden if need.name == "torch"))
