# SPDX-License-Identifier: Apache-2.0
"""vLLM engines of their own, without Dynamo, that take requests with the protocol's ``Sampling``."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Sequence
from typing import Any, Self

import msgspec
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from components.engine.protocol import GenerateOutput, GenerateRequest
from components.engine.vllm import native
from components.engine.vllm.arguments import configure
from components.engine.vllm.engine import VLLMEngine


def native_of(request: GenerateRequest, max_model_len: int, **more: Any) -> GenerateRequest:
    """The request in vLLM's form; ``max_tokens`` counts from the first output token, of whatever worker."""
    fields = {name: value for name, value in msgspec.structs.asdict(request.sampling).items() if value != ()}
    room = max_model_len - len(request.prompt_token_ids)
    fields["max_tokens"] = min(room, fields["max_tokens"] or room)
    if "stop_token_ids" in fields:
        fields["stop_token_ids"] = list(fields["stop_token_ids"])
    params = SamplingParams(**fields, detokenize=False, output_kind=RequestOutputKind.DELTA, **more)
    given = native.Native(params, request.priority)
    return msgspec.structs.replace(request, native=native.encode(given))


class SampledEngine(VLLMEngine):
    """See the module docstring."""

    @classmethod
    def of(
        cls, arguments: dict[str, Any], agent: dict[str, Any], stat_loggers: Sequence[Any] = (), **migration: Any
    ) -> Self:
        """Load the model; ``start`` follows. ``arguments`` are vLLM's; the others as for ``configure``.

        ``stat_loggers``: factories of vLLM's ``StatLoggerBase``, which see the counters of each step.
        """
        if arguments.get("enforce_eager"):
            # Even then vLLM compiles a helper of its log-probabilities: 20 s at the first request with them.
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        args = AsyncEngineArgs(**arguments)
        configure(args, agent, migration)
        loggers = list(stat_loggers)
        config = args.create_engine_config()
        return cls(AsyncLLM.from_vllm_config(config, stat_loggers=loggers or None, disable_log_stats=not loggers))

    async def stop(self) -> None:
        """End vLLM."""
        # vLLM's monitor would take the end of its core for a failure and print a traceback.
        logging.getLogger("vllm.v1.engine.async_llm").setLevel(logging.CRITICAL)
        # vLLM's own 5 s are too short where several engines share few cores.
        await asyncio.get_running_loop().run_in_executor(None, self.llm.shutdown, 20.0)

    def generate(self, request: GenerateRequest) -> AsyncIterator[GenerateOutput]:
        """As the protocol's."""
        return super().generate(request if request.native else native_of(request, self.info.max_model_len))
