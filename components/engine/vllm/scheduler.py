# SPDX-License-Identifier: Apache-2.0
"""vLLM schedulers with migration, for vLLM's ``scheduler_cls``.

    MigrationScheduler                one step at a time
    AsyncMigrationScheduler           schedules ahead of the device, vLLM's default
    InstrumentedMigrationScheduler    the same on top of Dynamo's scheduler with forward-pass metrics

The classes only connect ``Migration`` to vLLM; other calls of vLLM come through the connector. Importing this module
adds ``kv_control`` to the engine core (``compat/core.py``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from components import lifeline
from components.engine.vllm.compat import core, require_tested_vllm
from components.engine.vllm.compat.connectors import child_of, results_of
from components.engine.vllm.compat.scheduler import SchedulerPort
from components.engine.vllm.connector import MigrationConnector
from components.engine.vllm.control import COMMITTED
from components.engine.vllm.migration import Migration
from components.engine.vllm.records import StepResults
from components.errors import ConfigError

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request, RequestStatus

require_tested_vllm()
core.install()


class MigrationMixin(Scheduler):
    """Adds migration to a vLLM scheduler class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        lifeline.end_with_parent()
        super().__init__(*args, **kwargs)
        connector = child_of(self.connector, MigrationConnector)
        if connector is None:
            raise ConfigError("a scheduler that migrates needs kv_connector MigrationConnector in kv_transfer_config")
        connector.migration = self.migration = Migration(SchedulerPort(self), connector.settings)
        self._idle: tuple[Any, ...] | None = ()
        """What the last step without tokens had to tell; None in other steps."""

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """As vLLM's, after the copies for commits since the last step."""
        self.migration.before_step()
        return super().schedule(throttle_prefills)

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        """As vLLM's, without waiting for copies, which keep their blocks themselves."""
        ids = (
            [request_ids]
            if isinstance(request_ids, str)
            else list(self.requests if request_ids is None else request_ids)
        )
        self.migration.before_finish(ids)
        return super().finish_requests(ids, finished_status)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """As vLLM's; then freeze the requests that waited for this step."""
        if (transfers := model_runner_output.kv_connector_output) is not None:
            self.migration.handoff.summed(results_of(transfers.kv_connector_worker_meta, StepResults))
        self._idle = (self._idle or ()) if not scheduler_output.total_num_scheduled_tokens else None
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self.migration.after_step()
        if self.migration.untold:
            for output in (output for some in outputs.values() for output in some.outputs):
                if (tokens := self.migration.untold.get(output.request_id)) is not None:
                    output.kv_transfer_params = {COMMITTED: tokens, **(output.kv_transfer_params or {})}
            self.migration.forget_ended()
        return outputs

    def make_stats(self, *args: Any, **keywords: Any) -> SchedulerStats | None:
        """As vLLM's, but not once in each of hundreds of steps that only wait for copies: the process that serves all
        streams would read a message for each of them.
        """
        if self._idle is not None and all(given is None for given in (*args, *keywords.values())):
            news = (*self.get_request_counts(), self.kv_cache_manager.usage)
            if news == self._idle:
                return None
            self._idle = news
        return super().make_stats(*args, **keywords)

    def has_finished_requests(self) -> bool:
        """As vLLM's, which would take requests outside its queues for finished ones and step for ever."""
        return super().has_finished_requests() and not self.migration.has_only_taken_out()

    def shutdown(self) -> None:
        """As vLLM's."""
        self.migration.close()
        super().shutdown()


class MigrationScheduler(MigrationMixin):
    """For engines that schedule one step at a time."""


class AsyncMigrationScheduler(MigrationMixin, AsyncScheduler):
    """For engines that schedule ahead of the device."""


def __getattr__(name: str) -> Any:
    # Its base class needs Dynamo, which an engine core without Dynamo's worker lacks.
    if name != "InstrumentedMigrationScheduler":
        raise AttributeError(name)
    from dynamo.vllm.instrumented_scheduler import InstrumentedScheduler

    class InstrumentedMigrationScheduler(MigrationMixin, InstrumentedScheduler):
        """Publishes forward-pass metrics as Dynamo's scheduler does."""

    InstrumentedMigrationScheduler.__module__ = __name__
    InstrumentedMigrationScheduler.__qualname__ = name
    globals()[name] = InstrumentedMigrationScheduler
    return InstrumentedMigrationScheduler
