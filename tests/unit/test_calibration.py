# SPDX-License-Identifier: Apache-2.0
"""The limit from samples, and unusable files."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.cli.calibrate import explain
from components.errors import ConfigError
from components.transfer import lanes
from components.transfer.calibration import NEVER, Calibration, LaneCalibration, Point, load, save, threshold
from components.transfer.config import Transport


def points(*ratios: float) -> list[Point]:
    """Runs of 4, 16, 64 ... KiB; direct takes so many times what staging takes."""
    return [Point(4096, 4**n, 1 << 20, ratio, 1.0) for n, ratio in enumerate(ratios)]


@pytest.mark.parametrize(
    "ratios, limit",
    [((0.5, 0.5, 0.5), 0), ((2.0, 2.0, 2.0), NEVER), ((3.0, 1.5, 0.5), 65536), ((3.0, 0.9, 1.1, 0.3), 16384)],
)
def test_the_limit_lies_where_direct_descriptors_become_faster(ratios: tuple[float, ...], limit: int) -> None:
    assert threshold(points(*ratios)) == limit


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8))
def test_no_limit_loses_less(ratios: list[float]) -> None:
    def seconds(limit: int) -> float:
        product = 1.0
        for point in points(*ratios):
            product *= point.direct_s if point.run_bytes >= limit else point.staged_s
        return product

    best = seconds(threshold(points(*ratios)))
    assert all(best <= seconds(4096 * 4**n) * 1.000001 for n in range(9))


def test_a_lane_is_replaced_and_others_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    old = Calibration({}, (LaneCalibration("cpu", "cma", 5), LaneCalibration("cpu", "tcp", 6)))
    save(path, old.replaced(LaneCalibration("cpu", "cma", 0), {"nixl": "1"}))
    found = load(str(path))
    assert (found.direct_bytes("cpu", "cma"), found.direct_bytes("cpu", "tcp")) == (0, 6)
    assert found.direct_bytes("cuda", "cma") is None
    assert found.stages("cpu") and not found.stages("cuda")
    assert load("") == Calibration()


@pytest.mark.parametrize("content", [b"", b"[]", b'{"type":"calibration/1","x":1}', b"\xff", b"[" * 10_000])
def test_a_file_that_cannot_be_used_is_one_error_that_names_the_command(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "c.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="dynamo calibrate"):
        load(str(path))
    with pytest.raises(ConfigError, match="missing.json.*dynamo calibrate"):
        load(str(tmp_path / "missing.json"))


def test_the_rule_is_told_in_words() -> None:
    assert "where they are" in explain(0)
    assert "always gathered" in explain(NEVER)
    assert "64 KiB" in explain(65536)


def test_cuda_copy_is_only_asked_for_where_there_are_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "NVIDIA_DEVICES", tmp_path / "none")
    monkeypatch.setattr(lanes, "NVIDIA_CONTROL", tmp_path / "nvidiactl")
    assert lanes.environment(Transport.TCP, {}) == {"UCX_TLS": "tcp,self"}
    (tmp_path / "nvidiactl").touch()
    assert lanes.environment(Transport.TCP, {}) == {"UCX_TLS": "tcp,cuda_copy,self"}
    assert lanes.environment(Transport.TCP, {"UCX_TLS": "all"}) == {}
