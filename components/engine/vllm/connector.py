# SPDX-License-Identifier: Apache-2.0
"""The KV connector that vLLM loads: scheduler side keeps the queue of jobs, worker side runs them.

vLLM makes two instances, one in the scheduler and one in each worker. Which requests move, and when, is
decided in ``scheduler.py``; this class only answers vLLM's questions from that scheduler's records.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)

from components.engine.vllm.loader import Loader
from components.engine.vllm.records import StepMetadata, StepResults

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from components.engine.vllm.scheduler import MigrationMixin


class MigrationConnector(KVConnectorBase_V1):
    """vLLM's ``KVConnectorBase_V1`` over the transfer component."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.scheduler: MigrationMixin | None = None
        self.loader = Loader(vllm_config, kv_cache_config) if role is KVConnectorRole.WORKER else None

    @property
    def requires_kv_delivery(self) -> bool:
        """False: nothing is handed over when a request finishes, only while it is frozen."""
        return False

    # Scheduler side

    def _scheduler(self) -> MigrationMixin:
        if self.scheduler is None:
            raise RuntimeError("MigrationConnector needs scheduler_cls from components.engine.vllm.scheduler")
        return self.scheduler

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """See ``MigrationMixin.external_tokens``."""
        return self._scheduler().external_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Blocks exist now: the first copy job can be made."""
        if num_external_tokens:
            self._scheduler().blocks_allocated(request, blocks.get_block_ids()[0])

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Everything that the workers must do with this step."""
        return self._scheduler().step_metadata(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Results of the workers' jobs."""
        meta = connector_output.kv_connector_worker_meta
        if isinstance(meta, StepResults):
            self._scheduler().job_results(meta.results)

    # Worker side

    def _loader(self) -> Loader:
        if self.loader is None:
            raise RuntimeError("worker-side call on the scheduler's connector")
        return self.loader

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Register all KV pools with the transfer agent, once."""
        self._loader().register(kv_caches)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """First hook of a step: the model runner learns of migrated requests before it needs them."""
        if isinstance(kv_connector_metadata, StepMetadata):
            self._loader().install(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Start the step's copy jobs; those that the forward pass needs end here."""
        meta = self._get_connector_metadata()
        if isinstance(meta, StepMetadata):
            self._loader().start(meta)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: loads end before the forward pass."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing to save: blocks are read from the cache itself."""

    def wait_for_save(self) -> None:
        """Nothing to save."""

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks of ``wait`` jobs that failed in this step; vLLM recomputes them."""
        return self._loader().take_failed_blocks()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """Results since the last step."""
        results = self._loader().take_results()
        return StepResults(results) if results else None

    def shutdown(self) -> None:
        """Withdraw the agent's record and stop its threads."""
        if self.loader is not None:
            self.loader.close()
