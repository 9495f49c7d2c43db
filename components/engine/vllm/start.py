# SPDX-License-Identifier: Apache-2.0
"""Starts vLLM for an engine of its own, and describes an engine that has started.

``start`` blocks while vLLM loads the model. Raises ``ConfigError`` with vLLM's reason when it refuses the arguments.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from components.engine.protocol import EngineInfo
from components.engine.vllm import arguments
from components.engine.vllm.control import Reply
from components.errors import ConfigError


@dataclass(frozen=True)
class VLLMOptions:
    """Arguments of the engine: vLLM's, and those of migration."""

    engine_args: dict[str, Any]
    """Keyword arguments of vLLM's ``AsyncEngineArgs``."""
    agent: dict[str, Any]
    """Fields of ``components.transfer.AgentConfig``; layout fields are filled in by the worker."""
    integrity: str = "tail"
    """Checksums: ``tail`` (last two blocks), ``full`` or ``off``."""
    wait_bytes: int = 16 << 20
    """Size up to which a commit's copy is made between two steps; larger copies run beside the steps."""
    copy_deadline_s: float = 30.0
    lease_s: float = 60.0
    stat_loggers: Sequence[Any] = ()
    """Factories of vLLM's ``StatLoggerBase``, which see the counters of each step; without one there are none."""


def start(options: VLLMOptions) -> Any:
    """vLLM's ``AsyncLLM`` with these options."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    if options.engine_args.get("enforce_eager"):
        # Even then vLLM compiles a helper of its log-probabilities: 20 s at the first request with them.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    try:
        args = AsyncEngineArgs(**options.engine_args)
        arguments.configure(
            args,
            options.agent,
            {
                "integrity": options.integrity,
                "wait_bytes": options.wait_bytes,
                "copy_deadline_s": options.copy_deadline_s,
            },
        )
        loggers = list(options.stat_loggers)
        return AsyncLLM.from_vllm_config(
            args.create_engine_config(), stat_loggers=loggers or None, disable_log_stats=not loggers
        )
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        raise ConfigError(f"vLLM did not start: {error}") from error


def info_of(config: Any, reply: Reply, lease_s: float) -> EngineInfo:
    """From vLLM's ``VllmConfig`` and the answer to ``Op.INFO``."""
    model = config.model_config
    return EngineInfo(
        model=str(model.served_model_name or model.model),
        fingerprint=reply.fingerprint,
        block_size=config.cache_config.block_size,
        num_blocks=reply.num_blocks,
        max_model_len=model.max_model_len,
        max_num_seqs=config.scheduler_config.max_num_seqs,
        max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
        agents=reply.agents,
        lanes=reply.lanes,
        kv_bytes_per_token=reply.kv_bytes_per_token,
        lease_s=lease_s,
        steps_ahead=int(bool(config.scheduler_config.async_scheduling)),
        weights=reply.weights,
    )
