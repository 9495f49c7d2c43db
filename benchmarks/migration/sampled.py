# SPDX-License-Identifier: Apache-2.0
"""vLLM engines that take requests with the protocol's ``Sampling``, as engines without a model do."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from components.engine.protocol import GenerateOutput, GenerateRequest
from components.engine.vllm import native
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

    def generate(self, request: GenerateRequest) -> AsyncIterator[GenerateOutput]:
        """As the protocol's."""
        return super().generate(request if request.native else native_of(request, self.info.max_model_len))
