# SPDX-License-Identifier: Apache-2.0
"""``dynamo calibrate`` measures over real NIXL, and agents choose by the file it writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from components.transfer import Transport
from components.transfer import calibration as files
from components.transfer.calibrate import Grid, calibrate, runs_of
from components.transfer.calibration import Calibration, LaneCalibration
from tests.integration.transfer_peer import Peer

pytestmark = pytest.mark.integration


def test_every_point_is_measured_on_the_lane_that_was_asked_for() -> None:
    grid = Grid(block_bytes=(4096, 65536), run_blocks=(1, 4), total_bytes=1 << 20, repeats=1)
    seen = []
    measured = calibrate(Transport.TCP, "cpu", grid, seen.append)
    assert (measured.device, measured.lane) == ("cpu", "tcp")
    assert tuple(seen) == measured.points
    assert [(p.block_bytes, p.run_blocks) for p in seen] == [(4096, 1), (4096, 4), (65536, 1), (65536, 4)]
    assert all(point.direct_s > 0 and point.staged_s > 0 for point in seen)
    assert measured.direct_bytes == files.threshold(measured.points)


def test_runs_do_not_touch() -> None:
    blocks = runs_of(count=20, total=60, run=4, seed=1)
    assert len(set(blocks)) == 20 and max(blocks) < 60
    starts = [b for b in blocks if b - 1 not in blocks]
    assert len(starts) == 5 and all(set(range(s, s + 4)) <= set(blocks) for s in starts)


def test_agents_stage_short_runs_and_no_long_ones_as_the_file_says(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    files.save(path, Calibration({}, (LaneCalibration("cpu", "cma", 1024),)))
    common = {"block_size": 8, "backends": ("nixl",), "transport": "shm"}
    calibrated = [Peer(name, seed=n, **common, calibration=str(path)) for n, name in enumerate(("src", "dst"))]
    default = Peer("plain", seed=3, **common)
    try:
        src, dst = calibrated
        for one, other in ((src, dst), (dst, src), (default, src), (src, default), (dst, default), (default, dst)):
            one.meet(other)
        segments = [length for region in src.record.regions for _, _, length in region.segments]
        assert 1024 / 3 < sum(segments) / len(segments) < 1024, "one block is a short run here, three are a long one"
        # UCX names its lane with the first transfer; until then the default holds.
        assert dst.ask("strategy", "src", [0, 2, 4]) == "read"
        assert dst.ask("strategy", "src", [0, 2, 4]) == "staged"
        assert dst.ask("strategy", "src", [1, 2, 3]) == "read"
        # A peer without the file has no staging memory, and one that has none does not ask for it.
        assert dst.ask("strategy", "plain", [0, 2, 4]) == "read"
        assert default.ask("strategy", "src", [0, 2, 4]) == "read"
    finally:
        for peer in (*calibrated, default):
            peer.end()


@pytest.mark.slow
def test_the_command_writes_a_file_that_keeps_other_lanes(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    files.save(path, Calibration({}, (LaneCalibration("cuda", "cuda_ipc", 7),)))
    command = [sys.executable, "-m", "components.cli", "calibrate", "--quick", "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = files.load(str(path))
    assert [entry.device for entry in found.lanes] == ["cuda", "cpu"] and len(found.lanes[1].points) == 12
    assert "blocks are" in done.stdout
