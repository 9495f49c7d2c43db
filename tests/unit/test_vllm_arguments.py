# SPDX-License-Identifier: Apache-2.0
"""vLLM's arguments prepare an engine for migration; a conflict gives one clear error."""

from __future__ import annotations

from typing import Any

import pytest

from components.errors import ConfigError

pytest.importorskip("vllm")
from vllm.config import KVTransferConfig  # noqa: E402
from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: E402

from components.engine.vllm.arguments import configure  # noqa: E402

MODULE = "components.engine.vllm"


def configured(**given: Any) -> AsyncEngineArgs:
    args = AsyncEngineArgs(model="m", **given)
    configure(args, {"name": "here"})
    return args


@pytest.mark.parametrize(
    ("given", "scheduler"),
    [
        ({}, "AsyncMigrationScheduler"),
        ({"async_scheduling": False}, "MigrationScheduler"),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "MigrationScheduler"),
        (
            {"scheduler_cls": "dynamo.vllm.instrumented_scheduler.InstrumentedScheduler"},
            "InstrumentedMigrationScheduler",
        ),
    ],
)
def test_the_scheduler_is_ours_on_top_of_the_one_asked_for(given: dict[str, Any], scheduler: str) -> None:
    args = configured(**given)
    assert args.scheduler_cls == f"{MODULE}.scheduler.{scheduler}"
    assert args.worker_extension_cls == f"{MODULE}.worker.WorkerExtension"
    assert args.kv_transfer_config.kv_connector_module_path == f"{MODULE}.connector"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scheduler_cls": "mine.Scheduler"}, "scheduler_cls is mine.Scheduler"),
        ({"worker_extension_cls": "mine.Worker"}, "worker_extension_cls is 'mine.Worker'"),
        ({"data_parallel_size": 2}, "data_parallel_size is 2: start one worker for each"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size is 2: .* use tensor_parallel_size"),
        (
            {"kv_transfer_config": KVTransferConfig(kv_connector="MooncakeConnector", kv_role="kv_both")},
            "names MooncakeConnector, which does the work of MigrationConnector: leave it out",
        ),
    ],
)
def test_what_cannot_be_combined_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configured(**given)


OFFLOADING = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}
SIZED = OFFLOADING | {"kv_connector_extra_config": {"cpu_bytes_to_use": 1 << 30}}
NIXL = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}


@pytest.mark.parametrize(
    ("given", "beside"),
    [
        ({}, []),
        ({"kv_transfer_config": KVTransferConfig(**NIXL)}, []),
        ({"kv_transfer_config": KVTransferConfig(**SIZED, kv_load_failure_policy="recompute")}, [SIZED]),
        ({"kv_offloading_size": 1.0}, [SIZED]),
        ({"kv_offloading_size": 1.0, "kv_transfer_config": KVTransferConfig(**NIXL)}, [SIZED]),
        (
            {
                "kv_transfer_config": KVTransferConfig(
                    kv_connector="MultiConnector",
                    kv_role="kv_both",
                    kv_connector_extra_config={"connectors": [NIXL, SIZED, OFFLOADING]},
                )
            },
            [SIZED, OFFLOADING],
        ),
    ],
)
def test_other_connectors_stay_behind_ours(given: dict[str, Any], beside: list[dict[str, Any]]) -> None:
    args = configured(**given)
    transfer = args.kv_transfer_config
    assert transfer.kv_load_failure_policy == "recompute" and args.kv_offloading_size is None
    if not beside:
        assert transfer.kv_connector == "MigrationConnector"
        return
    first, *others = transfer.kv_connector_extra_config["connectors"]
    assert transfer.kv_connector == "MultiConnector" and first["kv_connector"] == "MigrationConnector"
    assert first["kv_connector_extra_config"]["agent"] == {"name": "here"}
    assert others == beside
