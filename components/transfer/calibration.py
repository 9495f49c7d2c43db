# SPDX-License-Identifier: Apache-2.0
"""Results of ``dynamo calibrate``: the mean run of blocks from which direct descriptors beat staging.

Plain values and their file; ``load`` raises ``ConfigError`` for an unusable file. ``threshold`` turns samples into
the one number that an agent needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from components.errors import ConfigError
from components.wire import UNREADABLE

_MAX_BYTES = 1 << 20
NEVER = 1 << 62
"""Staging was faster for every measured run."""

_Count = Annotated[int, msgspec.Meta(ge=0)]
_Seconds = Annotated[float, msgspec.Meta(gt=0)]


class Point(msgspec.Struct, frozen=True):
    """Median times of the same bytes, direct and staged."""

    block_bytes: _Count
    """Bytes of one block in one layer."""
    run_blocks: _Count
    """Neighbouring blocks in a row."""
    total_bytes: _Count
    direct_s: _Seconds
    staged_s: _Seconds

    @property
    def run_bytes(self) -> int:
        """Bytes of a run, the rule's input."""
        return self.block_bytes * self.run_blocks


class LaneCalibration(msgspec.Struct, frozen=True):
    """One kind of memory over one lane."""

    device: str
    """cpu or cuda"""
    lane: str
    """Transports that UCX chose, as in a result's lane: ``cma``, ``tcp``, ``cuda_ipc``, ``rc_mlx5``"""
    direct_bytes: _Count
    points: tuple[Point, ...] = ()


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="calibration/1"):
    """A file."""

    measured_on: dict[str, str] = {}
    lanes: tuple[LaneCalibration, ...] = ()

    def direct_bytes(self, device: str, lane: str) -> int | None:
        """The limit for this memory and lane; None where it was not measured."""
        found = [entry.direct_bytes for entry in self.lanes if (entry.device, entry.lane) == (device, lane)]
        return found[0] if found else None

    def stages(self, device: str) -> bool:
        """True when some lane of this memory wants staging for some runs."""
        return any(entry.device == device and entry.direct_bytes > 0 for entry in self.lanes)

    def replaced(self, new: LaneCalibration, measured_on: dict[str, str]) -> Calibration:
        """This calibration with one lane replaced."""
        kept = tuple(entry for entry in self.lanes if (entry.device, entry.lane) != (new.device, new.lane))
        return Calibration(measured_on, (*kept, new))


def threshold(points: Sequence[Point]) -> int:
    """The limit that loses least time over all points, each relative to its faster way."""
    runs = sorted({point.run_bytes for point in points})
    candidates = [0, *runs[1:], NEVER]

    def loss(limit: int) -> float:
        return sum(
            math.log((p.direct_s if p.run_bytes >= limit else p.staged_s) / min(p.direct_s, p.staged_s)) for p in points
        )

    return min(candidates, key=loss)


def load(path: str) -> Calibration:
    """Read a file; an empty path is an empty calibration."""
    if not path:
        return Calibration()
    try:
        if Path(path).stat().st_size > _MAX_BYTES:
            raise ConfigError(f"calibration {path}: larger than {_MAX_BYTES} bytes")
        return msgspec.json.decode(Path(path).read_bytes(), type=Calibration)
    except OSError as error:
        raise ConfigError(f"calibration {path}: {error.strerror}; write one with 'dynamo calibrate'") from error
    except UNREADABLE as error:
        raise ConfigError(f"calibration {path}: {error}; write a new one with 'dynamo calibrate'") from error


def save(path: Path, calibration: Calibration) -> None:
    """Write a file, whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(msgspec.json.format(msgspec.json.encode(calibration)) + b"\n")
    part.replace(path)
