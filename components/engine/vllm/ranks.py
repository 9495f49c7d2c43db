# SPDX-License-Identifier: Apache-2.0
"""Calls from the scheduler to all workers of the engine, outside the steps.

They run between two steps, after what the workers have been given before, and their results are lists in rank order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from components.engine.protocol import AgentRef
from components.engine.vllm.records import Job, JobResult

if TYPE_CHECKING:
    from vllm.v1.executor import Executor


@dataclass(frozen=True)
class RankInfo:
    """What the scheduler must know of one worker."""

    agent: AgentRef
    lanes: tuple[str, ...]
    fingerprint: str
    block_bytes: int
    """Bytes of one KV block."""
    weights: str
    """Digest of the model's weights."""


@dataclass(frozen=True)
class Snapshot:
    """A frozen request as one worker sees it."""

    rng_state: bytes
    checksums: list[int]


class Ranks:
    """The workers; each method is one of ``worker.WorkerExtension``."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def attach(self) -> list[RankInfo]:
        """Let each connector know its model runner."""
        return self._call("dm_attach")

    def snapshot(self, vllm_id: str, blocks: tuple[int, ...]) -> list[Snapshot]:
        """The state of a request that no step touches, with checksums of some of its blocks."""
        return self._call("dm_snapshot", vllm_id, blocks)

    def copy(self, job: Job, budget_s: float) -> list[JobResult | None]:
        """Begin a job and wait for it within a budget; None: it goes on beside the steps."""
        return self._call("dm_copy", job, budget_s)

    def _call(self, method: str, *args: Any) -> list[Any]:
        return list(self._executor.collective_rpc(method, args=args))
