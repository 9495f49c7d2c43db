# SPDX-License-Identifier: Apache-2.0
"""Methods that ``worker_extension_cls`` adds to vLLM's worker; ``ranks.Ranks`` calls them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from components.engine.vllm.compat.connectors import child_of
from components.engine.vllm.compat.runners import runner_port
from components.engine.vllm.ranks import RankInfo, Snapshot
from components.engine.vllm.records import Job, JobResult

if TYPE_CHECKING:
    from components.engine.vllm.connector import MigrationConnector


class WorkerExtension:
    """Mixed into vLLM's worker class."""

    model_runner: Any

    def dm_attach(self) -> RankInfo:
        """Give the connector the model runner; idempotent."""
        connector = _connector()
        connector.runner = runner_port(self.model_runner)
        loader = connector.loader
        agent = loader.agent
        record = agent.record
        divides = bool(record.pools)
        return RankInfo(agent.ref, agent.lanes, loader.fingerprint, record.block_bytes, loader.weights, divides)

    def dm_snapshots(self, wanted: Sequence[tuple[str, tuple[int, ...]]]) -> list[Snapshot]:
        """Generator states of requests, and checksums of some of their blocks: one call to the device for all."""
        connector = _connector()
        agent = connector.loader.agent
        blocks = [block for _, some in wanted for block in some]
        sums = iter(agent.checksums(blocks) if blocks else ())
        return [
            Snapshot(connector.runner.export_state(vllm_id), list(islice(sums, len(some) * agent.checksum_units)))
            for vllm_id, some in wanted
        ]

    def dm_copy(self, jobs: Sequence[Job], budget_s: float) -> list[JobResult | None]:
        """Run jobs at once; None for one that does not end within the budget."""
        return _connector().loader.copy_now(jobs, budget_s)


def _connector() -> MigrationConnector:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    from components.engine.vllm.connector import MigrationConnector

    group = get_kv_transfer_group()
    connector = child_of(group, MigrationConnector)
    if connector is None:
        raise TypeError(f"this worker's KV connector is {type(group).__name__}, not MigrationConnector")
    return connector
