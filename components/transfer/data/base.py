# SPDX-License-Identifier: Apache-2.0
"""What every way of moving blocks offers.

Contract: ``read`` is called from one posting thread and blocks it until all bytes are here or it raises a
``TransferError``; once it has returned or raised, nothing writes to the local blocks any more. ``cancelled``
is asked between pieces. The agent owns the deadline and passes what is left of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from components.transfer.config import Region, TransferResult
from components.transfer.control.record import AgentRecord


class Backend(Protocol):
    """One way of moving blocks."""

    @property
    def lane(self) -> str:
        """What is reported as the lane."""
        ...

    def describe(self) -> tuple[bytes, str]:
        """NIXL blob and TCP address for our record; the one that does not apply is empty."""
        ...

    def reaches(self, peer: AgentRecord) -> bool:
        """True when this backend can talk to the peer."""
        ...

    def read(
        self,
        peer: AgentRecord,
        src_blocks: Sequence[int],
        dst_blocks: Sequence[int],
        timeout_s: float,
        cancelled: Callable[[], bool],
    ) -> TransferResult:
        """Copy the peer's blocks into ours, pairwise."""
        ...

    def progress(self) -> None:
        """Called every millisecond or so by the posting thread while it has nothing to copy."""
        ...

    def close(self) -> None:
        """Give everything back. Nothing may be called afterwards."""
        ...


def runs(src: Sequence[int], dst: Sequence[int]) -> list[tuple[int, int, int]]:
    """Merge neighbouring pairs: (first source block, first local block, count)."""
    merged: list[tuple[int, int, int]] = []
    for s, d in zip(src, dst, strict=True):
        if merged and s == merged[-1][0] + merged[-1][2] and d == merged[-1][1] + merged[-1][2]:
            merged[-1] = (merged[-1][0], merged[-1][1], merged[-1][2] + 1)
        else:
            merged.append((s, d, 1))
    return merged


def extents(
    regions: Sequence[Region], peer: AgentRecord, pairs: Sequence[tuple[int, int, int]]
) -> list[tuple[int, int, int]]:
    """Memory to copy, as (remote address, local address, bytes), merged where blocks touch."""
    result = []
    for region, other in zip(regions, peer.regions, strict=True):
        for mine, (base, stride, length) in zip(region.segments, other.segments, strict=True):
            dense = mine.stride == mine.length and stride == length
            for src, dst, count in pairs:
                if dense:
                    result.append((base + src * stride, mine.address + dst * mine.stride, count * length))
                    continue
                for i in range(count):
                    remote, local = base + (src + i) * stride, mine.address + (dst + i) * mine.stride
                    result.append((remote, local, length))
    return result
