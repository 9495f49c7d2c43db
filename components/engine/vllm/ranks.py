# SPDX-License-Identifier: Apache-2.0
"""Calls from the scheduler to all workers of the engine, between steps.

They run after all earlier work of the workers; their results are lists in rank order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from components.engine.vllm.records import Job, JobResult
from components.transfer.ids import AgentRef

if TYPE_CHECKING:
    from vllm.v1.executor import Executor


@dataclass(frozen=True)
class RankInfo:
    """Facts about one worker for the scheduler."""

    agent: AgentRef
    lanes: tuple[str, ...]
    fingerprint: str
    block_bytes: int
    """Bytes of one KV block."""
    weights: str
    """Digest of the model's weights."""
    divides: bool = False
    """Whether blocks divide into KV heads."""


@dataclass(frozen=True)
class Snapshot:
    """State of a frozen request at one worker."""

    rng_state: bytes
    checksums: list[int]


class Ranks:
    """All workers; each method calls one of ``worker.WorkerExtension``."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def attach(self) -> list[RankInfo]:
        """Give each connector its model runner."""
        return self._call("dm_attach")

    def snapshots(self, wanted: Sequence[tuple[str, tuple[int, ...]]]) -> list[list[Snapshot]]:
        """The states of requests outside the steps, by vLLM's id, with checksums of some blocks of each."""
        return self._call("dm_snapshots", wanted)

    def copy(self, jobs: Sequence[Job], budget_s: float) -> list[list[JobResult | None]]:
        """Begin jobs and wait for all within a budget; None: it continues beside the steps."""
        return self._call("dm_copy", jobs, budget_s)

    def _call(self, method: str, *args: Any) -> list[Any]:
        return list(self._executor.collective_rpc(method, args=args))
