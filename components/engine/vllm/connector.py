# SPDX-License-Identifier: Apache-2.0
"""The KV connector that vLLM loads: its scheduler side asks ``Migration``, its worker side runs the copies.

vLLM makes one instance in the scheduler and one in each worker. ``migration.py`` decides what moves and when; this
class only answers vLLM's questions. No load is part of a step, so the order of loads and forward pass in vLLM does
not matter.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats, NixlPromMetrics

from components.engine.vllm.loader import Loader
from components.engine.vllm.migration import Migration, Settings
from components.engine.vllm.records import StepMetadata, StepResults
from components.transfer import AgentConfig

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from components.engine.vllm.compat.runners import RunnerPort


class MigrationConnector(KVConnectorBase_V1, SupportsHMA):
    """vLLM's ``KVConnectorBase_V1`` over the transfer component, for any number of KV cache groups."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        extra = transfer.kv_connector_extra_config if transfer else {}
        agent = AgentConfig.of({"name": "any"} | extra.get("agent", {}))
        self.settings = Settings(**extra.get("migration", {}), host=agent.advertise_host)
        self._migration: Migration | None = None
        self._loader = Loader(vllm_config, kv_cache_config) if role is KVConnectorRole.WORKER else None
        self._runner: RunnerPort | None = None

    # Scheduler side

    @property
    def migration(self) -> Migration:
        """Set by the scheduler."""
        if self._migration is None:
            raise RuntimeError("MigrationConnector needs scheduler_cls from components.engine.vllm.scheduler")
        return self._migration

    @migration.setter
    def migration(self, migration: Migration) -> None:
        self._migration = migration

    def on_new_request(self, request: Request) -> None:
        """A new request."""
        self.migration.on_new_request(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """See ``Migration.external_tokens``."""
        return self.migration.external_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """vLLM's blocks for a request from a prefill engine. (A landing reserves its blocks before vLLM asks.)"""
        self.migration.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Work of the workers with this step."""
        return self.migration.step_metadata(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Results of the workers' jobs."""
        meta = connector_output.kv_connector_worker_meta
        if isinstance(meta, StepResults):
            self.migration.step_results(meta)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Never delays freeing: blocks of a copy, and lent ones, no longer belong to the request."""
        return False, self.migration.request_finished(request)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """The same, beside a connector that knows one group only."""
        return self.request_finished_all_groups(request, (block_ids,))

    def has_pending_push_work(self) -> bool:
        """True while a worker owes a result: vLLM must go on stepping."""
        return self.migration.incoming.copies.busy

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """Copies of prompts since the last call, see ``transfers``. None on workers."""
        return None if self._migration is None else self._migration.incoming.copies.prompts.take()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats:
        """``get_kv_connector_stats`` of another process."""
        return NixlKVConnectorStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: VllmConfig, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> KVConnectorPromMetrics:
        """The metrics of vLLM's ``NixlConnector``."""
        return NixlPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # Worker side

    @property
    def loader(self) -> Loader:
        """The transfer agent and its jobs."""
        if self._loader is None:
            raise RuntimeError("worker-side call on the scheduler's connector")
        return self._loader

    @property
    def runner(self) -> RunnerPort:
        """The worker's model runner, known after the engine's ``info``."""
        if self._runner is None:
            raise RuntimeError("a request from elsewhere came before the engine was asked for its agents")
        return self._runner

    @runner.setter
    def runner(self, runner: RunnerPort) -> None:
        self._runner = runner

    def get_mem_pool_context(self) -> AbstractContextManager[Any] | None:
        """Context in which vLLM makes its KV caches."""
        return self.loader.allocation()

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Register all KV pools with the transfer agent, once."""
        self.loader.register(kv_caches)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """First hook of a step: enters migrated requests into the model runner."""
        if isinstance(kv_connector_metadata, StepMetadata):
            for install in kv_connector_metadata.installs:
                self.runner.import_state(install)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Begin the step's copies and collect finished ones."""
        meta = self._get_connector_metadata()
        if isinstance(meta, StepMetadata):
            self.loader.step(meta.jobs, meta.cancelled)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: no step reads the blocks that it loads."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing to save: peers read blocks from the cache itself."""

    def wait_for_save(self) -> None:
        """Nothing to save."""

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """Results since the last step, and checksums of the blocks that it has computed."""
        meta = self._get_connector_metadata()
        if isinstance(meta, StepMetadata):
            self.loader.sum(meta.to_sum)
        return self.loader.take_results()

    def shutdown(self) -> None:
        """Withdraw the agent's record and stop its threads."""
        if self._loader is not None:
            self._loader.close()


# ``MultiConnector`` looks for the class by this name when it logs.
KVConnectorFactory.register_connector(MigrationConnector.__name__, __name__, MigrationConnector.__name__)
