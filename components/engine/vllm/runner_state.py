# SPDX-License-Identifier: Apache-2.0
"""Puts a request that was generated elsewhere into vLLM's model runner, and reads its generator out.

vLLM keeps a preempted request's state (output tokens, random generator) in the model runner and goes on
with it when the request is scheduled again. A migrated request is entered in the same form, so penalties,
minimum lengths and seeded sampling continue exactly where they stopped.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from components.engine.vllm.records import Install


class RunnerState:
    """Access to the model runner of this worker; ``attach`` comes first."""

    def __init__(self) -> None:
        self._runner: Any = None

    def attach(self, model_runner: Any) -> None:
        """Called once by the worker extension, after the model has been loaded."""
        self._runner = model_runner

    def install(self, install: Install) -> None:
        """Create the runner's state of a request. The scheduler sends block ids with the step."""
        from vllm.sampling_params import SamplingType
        from vllm.v1.worker.gpu_input_batch import CachedRequestState

        params = install.sampling_params
        generator = None
        if params.sampling_type == SamplingType.RANDOM_SEED:
            generator = torch.Generator(device=self._runner.device)
            generator.manual_seed(params.seed)
            if install.rng_state:
                generator.set_state(_to_tensor(install.rng_state))
            else:
                self._skip_draws(generator, len(install.output_token_ids))
        self._runner.requests[install.vllm_id] = CachedRequestState(
            req_id=install.vllm_id,
            prompt_token_ids=install.prompt_token_ids,
            mm_features=[],
            sampling_params=params,
            generator=generator,
            block_ids=([],),
            num_computed_tokens=0,
            output_token_ids=list(install.output_token_ids),
            lora_request=install.lora_request,
        )

    def rng_state(self, vllm_id: str) -> bytes:
        """State of a request's own generator; empty when it has none."""
        request = self._runner.requests.get(vllm_id)
        if request is None or request.generator is None:
            return b""
        return bytes(request.generator.get_state().numpy().tobytes())

    def set_rng_state(self, vllm_id: str, state: bytes) -> None:
        """Turn a generator back, after a step whose token was thrown away."""
        request = self._runner.requests.get(vllm_id)
        if request is not None and request.generator is not None and state:
            request.generator.set_state(_to_tensor(state))

    def _skip_draws(self, generator: torch.Generator, count: int) -> None:
        # vLLM's sampler draws one float32 exponential per vocabulary entry for every token
        # (v1/sample/ops/topk_topp_sampler.py, random_sample): replay draws the same and drops them.
        row = torch.empty(self._runner.input_batch.vocab_size, dtype=torch.float32, device=self._runner.device)
        for _ in range(count):
            row.exponential_(generator=generator)


def _to_tensor(state: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(state, dtype=np.uint8).copy())


class WorkerExtension:
    """Mixed into vLLM's worker by ``worker_extension_cls``; called with ``collective_rpc``."""

    model_runner: Any

    def dm_attach(self) -> dict[str, Any]:
        """Give the connector the model runner; returns what the scheduler must know of this rank."""
        loader = _loader()
        loader.runner.attach(self.model_runner)
        agent = loader.agent
        return {
            "name": agent.ref.name,
            "epoch": agent.ref.epoch,
            "lanes": list(agent.lanes),
            "fingerprint": loader.fingerprint,
            "kv_bytes_per_token": loader.kv_bytes_per_token,
        }

    def dm_snapshot(self, vllm_id: str, blocks: list[int]) -> tuple[bytes, list[int]]:
        """Generator state of a request and checksums of some of its blocks."""
        loader = _loader()
        return loader.runner.rng_state(vllm_id), list(loader.agent.checksums(blocks)) if blocks else []


def _loader() -> Any:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group()._loader()
